"""Host memory of an import: python -m launch.bench.import_checkpoint --size=1b

Writes a released AVG-LLaVA with real shapes and random weights, in bfloat16 and in shards, imports it in a separate
process, and prints that process's peak resident memory and its limit: 1.3 times the largest shard plus the part of the
model on this host's devices. On one CPU device that is the whole model. Needs twice the model's size on disk, which is
freed at the end.
"""

import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import flags

from avg_llava_jax.commands import cli

LLAMA_3 = {"kv_heads": 8, "mlp_width": 8192, "vocab_size": 128256, "tied_embeddings": True}
SIZES = {
    "1b": LLAMA_3 | {"width": 2048, "layers": 16, "heads": 32, "head_dim": 64},
    "3b": LLAMA_3 | {"width": 3072, "layers": 28, "heads": 24, "head_dim": 128},
    "7b": {},
}
"""Llama 3.2 1B and 3B, and Vicuna 7B; the vision encoder is CLIP-L/14 at 336 pixels."""

SIZE = flags.DEFINE_enum("size", "1b", list(SIZES), "Of the language model.")
FOLDER = flags.DEFINE_string("folder", None, "Where to write; default: the system's temporary folder.")
SHARD_SIZE = flags.DEFINE_float("shard_size", 5.0, "Largest file, in GiB.", lower_bound=1e-3)


def write_source(folder: pathlib.Path) -> None:
    """Write an AVG-LLaVA in the released layout; its weights repeat one random block."""
    import numpy as np

    from avg_llava_jax import ASSETS, checkpoint
    from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig
    from avg_llava_jax.convert import convert, foreign, layouts, tensors

    config = ModelConfig(
        language=LanguageConfig(**SIZES[SIZE.value]), router=RouterConfig(attention="tiles"), unpad="released"
    )
    dtype = tensors.DTYPES["BF16"]
    announced = {
        name: (shape, dtype) for name, shape in (foreign.torch_shapes(config) | foreign.idle_shapes(config)).items()
    }
    block = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(dtype)
    tensors.save(folder, announced, lambda name: np.resize(block, announced[name][0]), int(SHARD_SIZE.value * 2**30))
    convert.write_json(folder / "config.json", layouts.released_config(config, {}, router=True, tower=""))
    for path in (ASSETS / checkpoint.TOKENIZER).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def main() -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as beside:
        source, output = pathlib.Path(beside) / "source", pathlib.Path(beside) / "output"
        source.mkdir()
        write_source(source)
        shards = [path.stat().st_size for path in source.glob("*.safetensors")]
        print(f"{len(shards)} shards, {sum(shards) / 1e9:.2f} GB, the largest {max(shards) / 1e9:.2f} GB", flush=True)
        begin = time.perf_counter()
        module = "launch.import_torch"
        subprocess.run([sys.executable, "-m", module, f"--source={source}", f"--output={output}"], check=True)
        took = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
    limit = 1.3 * max(shards) + sum(shards)
    verdict = "within" if peak <= limit else "over"
    print(f"imported in {took:.0f} s; peak {peak / 1e9:.2f} GB, {verdict} the limit of {limit / 1e9:.2f} GB")


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=[])
