"""Export a checkpoint as a PyTorch folder.

    avg-llava export --checkpoint=CHECKPOINT --output=FOLDER --layout=released|transformers|peft [--dtype=bfloat16]

`transformers` is for AutoModelForImageTextToText with trust_remote_code (the adaptive model) and for
LlavaNextForConditionalGeneration (always the finest granularity); `released` is for the released code. Both fold
adapters in. `peft` writes the adapters alone, with connector and router, for the peft library on the base.
"""

from absl import flags

from avg_llava_jax.commands import cli

OUTPUT = flags.DEFINE_string("output", None, "The folder to write.")
LAYOUT = flags.DEFINE_enum("layout", "released", ["released", "transformers", "peft"], "The layout to write.")
ROUTER = flags.DEFINE_bool("router", True, "--norouter leaves the router out, which gives a LLaVA-NeXT.")
SHARD_SIZE = flags.DEFINE_float("shard_size", 5.0, "Size of the largest file, in GiB.", lower_bound=1e-6)
REPORT = flags.DEFINE_string(
    "report", None, "report.json of `avg-llava evaluate`, for the model card; default: that of the checkpoint folder."
)


def main() -> None:
    from avg_llava_jax.convert import convert

    export = getattr(convert, f"export_{LAYOUT.value}")
    shard_size = int(SHARD_SIZE.value * convert.GIB)
    export(cli.CHECKPOINT.value, OUTPUT.value, cli.DTYPE.value, shard_size, ROUTER.value, REPORT.value)
    print(f"{OUTPUT.value}: {LAYOUT.value} layout, from {cli.CHECKPOINT.value}")


def command() -> None:
    cli.run(main, required=["output"], model_flags=cli.STORED_FLAGS)
