"""Import a PyTorch folder or a model from the hub as a checkpoint folder.

    avg-llava import --source=FOLDER_OR_HUB_ID --output=CHECKPOINT [--vision_tower=CLIP_FOLDER]

AVG-LLaVA and LLaVA-NeXT are imported as they are. A Llama or Mistral is joined with the CLIP folder of --vision_tower;
connector, newline and router are initialised by --seed. An adapter of peft or of LLaVA's own training code is imported
with --base=FOLDER, its base, to which the checkpoint refers. --dry_run only matches config, keys and shapes; the weight
files need not exist.
"""

from absl import flags

from avg_llava_jax.commands import cli

SOURCE = flags.DEFINE_string(
    "source", None, "A folder or hub id: AVG-LLaVA, LLaVA-NeXT, LLaVA-OneVision, or a decoder to join with a tower."
)
OUTPUT = flags.DEFINE_string("output", None, "The checkpoint folder to write.")
BASE = flags.DEFINE_string("base", None, "The base of an adapter: a checkpoint of ours or a PyTorch folder.")
MESH = flags.DEFINE_string(
    "mesh", None, "Such as data=1,fsdp=-1,tensor=1: shards the tensors as they are read; default: one device."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters that the source lacks.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only match config, keys and shapes.")


def main() -> None:
    from avg_llava_jax.convert import convert
    from avg_llava_jax.parallel import sharding

    if DRY_RUN.value:
        print(convert.dry_run(SOURCE.value, cli.VISION_TOWER.value))
        return
    if not OUTPUT.value:
        raise ValueError("--output is missing; --help lists all flags")
    if BASE.value:
        convert.import_adapter(SOURCE.value, BASE.value, OUTPUT.value, cli.VISION_TOWER.value)
        print(f"{OUTPUT.value}: the adapters of {SOURCE.value} on {BASE.value}")
        return
    mesh = sharding.make_mesh(sharding.read_sizes(MESH.value)) if MESH.value else None
    config = convert.import_folder(
        SOURCE.value, OUTPUT.value, cli.VISION_TOWER.value, cli.DTYPE.value, mesh, SEED.value
    )
    print(f"{OUTPUT.value}: granularities {list(config.granularities)}, router.attention={config.router.attention}")


def command() -> None:
    cli.run(main, required=["source"], model_flags=cli.STORED_FLAGS)
