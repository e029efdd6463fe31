"""Read a PyTorch folder, or a model of the hub, into a checkpoint folder of ours.

    avg-llava import --source=FOLDER_OR_HUB_ID --output=CHECKPOINT [--vision_tower=CLIP_FOLDER]

AVG-LLaVA and LLaVA-NeXT come in as they are. A Llama or Mistral is joined with the CLIP folder that --vision_tower
names; its connector, newline and router are fresh, by --seed. --dry_run matches config, keys and shapes, and reads no
weights: not even the files need to be there.
"""

from absl import flags

from avg_llava_jax.commands import cli

SOURCE = flags.DEFINE_string(
    "source", None, "A folder or hub id: AVG-LLaVA or LLaVA-NeXT as released, `llava_next`, Llama, Mistral."
)
OUTPUT = flags.DEFINE_string("output", None, "The checkpoint folder to make.")
MESH = flags.DEFINE_string(
    "mesh", None, "As data=1,fsdp=-1,tensor=1: spreads the tensors over devices as they are read; default: one device."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the parameters that the source lacks.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only match config, keys and shapes.")


def main() -> None:
    from avg_llava_jax.convert import convert
    from avg_llava_jax.parallel import sharding

    if DRY_RUN.value:
        print(convert.dry_run(SOURCE.value, cli.VISION_TOWER.value))
        return
    if not OUTPUT.value:
        raise ValueError("--output is missing; --help lists all flags")
    mesh = sharding.make_mesh(sharding.read_sizes(MESH.value)) if MESH.value else None
    config = convert.import_folder(
        SOURCE.value, OUTPUT.value, cli.VISION_TOWER.value, cli.DTYPE.value, mesh, SEED.value
    )
    print(f"{OUTPUT.value}: granularities {list(config.granularities)}, router.attention={config.router.attention}")


def command() -> None:
    cli.run(main, required=["source"], model_flags=cli.STORED_FLAGS)
