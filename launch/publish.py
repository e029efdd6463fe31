"""A training workdir as a checkpoint to hand on: config, tokenizer and newest parameters, without optimizer and logs.

python -m launch.publish --checkpoint=WORKDIR --output=FOLDER

Of absolute paths among the training settings only the last name is kept: they mean nothing on another machine.
"""

import pathlib
import shutil
import tempfile
from typing import Any

from absl import flags

from avg_llava_jax import checkpoint, foreign
from launch import cli

OUTPUT = flags.DEFINE_string("output", None, "The folder to write; one that is there is replaced once all is written.")


def portable(value: Any) -> Any:
    """Training settings, nested, with absolute paths cut to their last name."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, str) and pathlib.Path(value).is_absolute():
        return pathlib.Path(value).name
    return value


def main() -> None:
    source, output = pathlib.Path(cli.CHECKPOINT.value), pathlib.Path(OUTPUT.value)
    loaded = checkpoint.load(source)
    _, values = checkpoint.read_config(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as beside:
        folder = pathlib.Path(beside) / output.name
        checkpoint.save_config(folder, loaded.config, portable(values["training"]), values["granularities_trained"])
        checkpoint.copy_tokenizer(loaded.tokenizer_folder, folder)
        foreign.keep_unused(source, folder)
        with checkpoint.Manager(folder) as manager:
            manager.save(loaded.meta["step"], loaded.params)
            manager.wait()
        (folder / checkpoint.LOCK).unlink()
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: step {loaded.meta['step']}, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run(main, required=["output"], model_flags=["checkpoint"])
