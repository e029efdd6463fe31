"""A PyTorch folder as a checkpoint folder of ours:

    python -m launch.import_torch --source=FOLDER_OR_HUB_ID --output=CHECKPOINT [--vision_tower=CLIP_FOLDER]

--dry_run matches config, keys and shapes, and reads no weights: not even the files need to be there.
"""

from absl import flags

from launch import cli

SOURCE = flags.DEFINE_string(
    "source", None, "A folder or hub id: AVG-LLaVA or LLaVA-NeXT as released, or `llava_next`."
)
OUTPUT = flags.DEFINE_string("output", None, "The checkpoint folder to make.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only match config, keys and shapes.")


def main() -> None:
    from avg_llava_jax import convert

    if DRY_RUN.value:
        print(convert.dry_run(SOURCE.value, cli.VISION_TOWER.value))
        return
    if not OUTPUT.value:
        raise ValueError("--output is missing; --help lists all flags")
    config = convert.import_folder(SOURCE.value, OUTPUT.value, cli.VISION_TOWER.value, cli.DTYPE.value)
    print(f"{OUTPUT.value}: granularities {list(config.granularities)}, router.attention={config.router.attention}")


if __name__ == "__main__":
    cli.run(main, required=["source"])
