"""Reduce a training workdir to a checkpoint for others, without optimizer and logs.

    avg-llava publish --checkpoint=WORKDIR --output=FOLDER

FOLDER gets config, tokenizer and the newest parameters; with adapters, it expects the folder of their base beside it.
Absolute paths among the training settings are reduced to their last component, since they mean nothing on another
machine.
"""

import pathlib

from absl import flags

from avg_llava_jax.commands import cli

OUTPUT = flags.DEFINE_string("output", None, "The folder to write; replaces an existing one at the end.")


def main() -> None:
    from avg_llava_jax import checkpoint
    from avg_llava_jax.convert import convert, foreign
    from avg_llava_jax.files import portable, whole

    source, output = pathlib.Path(cli.CHECKPOINT.value), pathlib.Path(OUTPUT.value)
    loaded = checkpoint.load(source)
    meta = loaded.meta | {"training": portable(loaded.meta["training"])}
    if base := meta.get("base"):
        beside = {key: f"../{pathlib.Path(base[key]).name}" for key in ("path", "vision_tower") if base[key]}
        meta["base"] = base | beside
    with whole(output, replace=True) as folder:
        convert.write_checkpoint(loaded._replace(meta=meta), folder)
        foreign.keep_unused(source, folder)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: step {loaded.meta['step']}, {size / 2**20:.1f} MiB")


def command() -> None:
    cli.run(main, required=["output"], model_flags=["checkpoint"])
