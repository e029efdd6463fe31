"""Fold adapters into their base: a checkpoint that needs no base.

    avg-llava merge --checkpoint=CHECKPOINT --output=FOLDER [--dtype=float32]

CHECKPOINT is a run of adapters or a folder of the peft library. The sum of weights and adapters is computed in float32
and stored in the dtype of the base, or in --dtype.
"""

from absl import flags

from avg_llava_jax.commands import cli

OUTPUT = flags.DEFINE_string("output", None, "The checkpoint folder to write.")


def main() -> None:
    from avg_llava_jax.convert import convert

    convert.merge(cli.CHECKPOINT.value, OUTPUT.value, cli.DTYPE.value)
    print(f"{OUTPUT.value}: the adapters of {cli.CHECKPOINT.value}, folded in")


def command() -> None:
    cli.run(main, required=["output"], model_flags=("checkpoint", "dtype"))
