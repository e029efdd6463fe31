"""What the commands share: flags for a model, and errors as one line.

Commands import what needs JAX late, so that --help and a mistyped flag are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging

from avg_llava_jax import SHIPPED
from avg_llava_jax.files import refuse_buckets

if TYPE_CHECKING:
    from avg_llava_jax.inference.api import AvgLlava

CHECKPOINT = flags.DEFINE_string("checkpoint", str(SHIPPED), "Checkpoint folder of ours, or a PyTorch folder.")
VISION_TOWER = flags.DEFINE_string("vision_tower", None, "The CLIP folder that a PyTorch checkpoint names, or to join.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Converts the parameters; default: as stored.")
QUANTIZE = flags.DEFINE_enum("quantize", None, ["int8"], "Hold the language model's weights so; default: as they are.")
STORED_FLAGS = tuple(flag.name for flag in (CHECKPOINT, VISION_TOWER, DTYPE))
MODEL_FLAGS = (*STORED_FLAGS, QUANTIZE.name)
TEXT_FLAGS = ("prompt", "stop", "name", "coordinator")  # what they hold is no path, whatever it looks like
TRACEBACK = flags.DEFINE_bool("traceback", False, "Where an error happened, not only what it is.")


def load_model() -> AvgLlava:
    """The model that the flags name."""
    from avg_llava_jax.inference.api import AvgLlava

    return AvgLlava.load(CHECKPOINT.value, VISION_TOWER.value, dtype=DTYPE.value, quantize=QUANTIZE.value)


def weights_of(texts: list[str]) -> list[float]:
    """["0", "0.5"] -> [0.0, 0.5]; ValueError for what is no weight."""
    try:
        weights = [float(text) for text in texts]
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"--cost_weights={','.join(texts)}: give numbers of 0 or more, comma separated")
    return sorted(set(weights))


def run(main: Callable[[], None], required: Sequence[str], model_flags: Sequence[str] = MODEL_FLAGS) -> None:
    """Run a command. Bad flags and bad input end it with one line and exit code 2, a lost connection with 75.

    required: flags that must be given. model_flags: those of `MODEL_FLAGS` that the command reads; it has no others.
    """
    for name in set(MODEL_FLAGS) - set(model_flags):
        delattr(flags.FLAGS, name)
    for name in (*model_flags, TRACEBACK.name):  # so that --help shows them beside the command's own
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = app.parse_flags_with_usage(argv) if {"--help", "--helpfull"} & set(argv) else flags.FLAGS(argv)
            missing = [name for name in required if not flags.FLAGS[name].value]
        except AttributeError as error:  # from --config.x=1, where the config has no x
            name = str(error).strip("'\"")
            _fail(f"the config has no setting {name!r}")
        except (flags.Error, OSError) as error:
            message, _, trace = str(error).partition("Traceback (most recent call last):\n")
            _fail(message + trace.strip().rpartition("\n")[2])
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        if missing:
            _fail(f"--{missing[0]} is missing; --help lists all flags")
        return rest

    def guarded(_: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # JAX and Orbax report much at INFO
        try:
            refuse_buckets({name: flags.FLAGS[name].value for name in flags.FLAGS if name not in TEXT_FLAGS})
            main()
        except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
            if TRACEBACK.value:
                raise
            from avg_llava_jax.parallel import hosts

            message = f"{_one_line(error)} (--traceback shows where)"
            hosts.leave(hosts.RESTART if isinstance(error, ConnectionError) else 2, message)

    app.run(guarded, flags_parser=parse)


def _fail(message: object) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
