"""A checkpoint of ours as a PyTorch folder:

python -m launch.export_torch --checkpoint=CHECKPOINT --output=FOLDER --layout=released|transformers [--dtype=bfloat16]
"""

from absl import flags

from launch import cli

OUTPUT = flags.DEFINE_string("output", None, "The folder to make.")
LAYOUT = flags.DEFINE_enum(
    "layout", "released", ["released", "transformers"], "Who is to read it; `transformers` as the finest granularity."
)
ROUTER = flags.DEFINE_bool("router", True, "In the released layout; --norouter leaves it out: a LLaVA-NeXT.")
SHARD_SIZE = flags.DEFINE_float("shard_size", 5.0, "Largest file, in GiB.", lower_bound=1e-6)


def main() -> None:
    from avg_llava_jax import convert

    shard_size = int(SHARD_SIZE.value * convert.GIB)
    paths = cli.CHECKPOINT.value, OUTPUT.value
    if LAYOUT.value == "released":
        convert.export_released(*paths, cli.DTYPE.value, shard_size, ROUTER.value)
    else:
        convert.export_transformers(*paths, cli.DTYPE.value, shard_size)
    print(f"{OUTPUT.value}: {LAYOUT.value} layout, from {cli.CHECKPOINT.value}")


if __name__ == "__main__":
    cli.run(main, required=["output"])
