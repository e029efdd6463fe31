"""Shared code of the commands: flags for a model and for a config, and errors as one line.

Commands import JAX late, so that --help and a mistyped flag return at once.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from avg_llava_jax import SHIPPED, configs
from avg_llava_jax.extras import MissingExtra
from avg_llava_jax.files import refuse_buckets

if TYPE_CHECKING:
    from avg_llava_jax.inference.api import AvgLlava

CHECKPOINT = flags.DEFINE_string("checkpoint", str(SHIPPED), "A checkpoint folder of ours, or a PyTorch folder.")
VISION_TOWER = flags.DEFINE_string("vision_tower", None, "The CLIP folder that a PyTorch checkpoint names or lacks.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the parameters; default: as stored.")
QUANTIZE = flags.DEFINE_enum("quantize", None, ["int8"], "Quantizes the language model's weights; default: off.")
STORED_FLAGS = tuple(flag.name for flag in (CHECKPOINT, VISION_TOWER, DTYPE))
MODEL_FLAGS = (*STORED_FLAGS, QUANTIZE.name)
TEXT_FLAGS = ("prompt", "stop", "name", "coordinator")  # their values are never paths
COMPILED = flags.DEFINE_string(
    "compiled",
    None,
    "Folder that keeps compiled programs for the next run; empty keeps none. "
    "Default: JAX_COMPILATION_CACHE_DIR, else the user's cache folder.",
)
COMPILED_BYTES = 2**30
"""Bytes that `--compiled` may take; the programs that were unused for longest go first."""
TRACEBACK = flags.DEFINE_bool("traceback", False, "Print the traceback of an error, not only its message.")


def load_model(adapters: Mapping[str, str] | None = None) -> AvgLlava:
    """The model that the flags name, with adapters."""
    from avg_llava_jax.inference.api import AvgLlava

    return AvgLlava.load(
        CHECKPOINT.value, VISION_TOWER.value, dtype=DTYPE.value, quantize=QUANTIZE.value, adapters=adapters
    )


def keep_compiled() -> None:
    """Let XLA load the programs that an earlier run compiled. Call it before JAX is imported.

    Several processes may share the folder: JAX locks it, and compiles again what is damaged. A folder that cannot be
    written is one line on stderr.
    """
    if COMPILED.value == "":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if COMPILED.value is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = pathlib.Path(COMPILED.value or cache / "avg_llava_jax" / "compiled")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(f"compiled programs are not kept: {folder}: {error.strerror} (--compiled=DIR)", file=sys.stderr)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(COMPILED_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


class ConfigFile(flags.ArgumentParser):
    """Parse `FILE.py` or `FILE.py:ARGUMENT` to the result of its `get_config`.

    `configs/NAME.py` is the package's own config unless the working directory has such a file.
    """

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        """The config of a file. Raises ValueError where there is no such file."""
        name, colon, stage = argument.partition(":")
        file = pathlib.Path(name)
        if not file.is_file() and file.parent == pathlib.Path("configs"):
            file = CONFIGS / file.name
        if not file.is_file():
            shipped = ", ".join(sorted(f"configs/{each.name}" for each in CONFIGS.glob("[!_]*.py")))
            raise ValueError(f"{name} does not exist; the package has {shipped}")
        return self._parser.parse(f"{file}{colon}{stage}")

    def flag_type(self) -> str:
        return self._parser.flag_type()


CONFIGS = pathlib.Path(configs.__file__).parent


def define_config(help: str) -> flags.FlagHolder[Any]:
    """The flag --config, whose fields are flags as well: --config.steps=10."""
    holder = config_flags.DEFINE_config_file("config", None, help, lock_config=True)
    flags.FLAGS["config"].parser = ConfigFile(flags.FLAGS["config"].parser)
    return holder


def weights_of(texts: list[str]) -> list[float]:
    """["0", "0.5"] -> [0.0, 0.5]. Raises ValueError for an invalid weight."""
    try:
        weights = [float(text) for text in texts]
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"--cost_weights={','.join(texts)}: give numbers of 0 or more, comma separated")
    return sorted(set(weights))


def run(main: Callable[[], None], required: Sequence[str], model_flags: Sequence[str] = MODEL_FLAGS) -> None:
    """Run a command. Bad flags and bad input exit with one line and code 2, a lost connection with 75, Ctrl+C with 130.

    required: flags that must be set. model_flags: the subset of `MODEL_FLAGS` that the command has.
    """
    for name in set(MODEL_FLAGS) - set(model_flags):
        delattr(flags.FLAGS, name)
    # absl's --help shows docstring and flags of __main__; here they must be those of the command's module.
    module = sys.modules[main.__module__]
    sys.modules["__main__"].__doc__ = module.__doc__
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(module.__name__)]
    own += [name for name in ("config",) if name in flags.FLAGS]
    for name in (*own, *model_flags, COMPILED.name, TRACEBACK.name):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def parse(argv: list[str]) -> list[str]:
        for flag in {"-h", "--help", "--helpfull"} & set(argv):
            with contextlib.suppress(SystemExit):  # absl exits with 1 after --help
                app.parse_flags_with_usage([argv[0], "--help" if flag == "-h" else flag])
            sys.exit(0)
        try:
            rest = flags.FLAGS(argv)
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
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer or a path may not fit the terminal's encoding
        try:
            refuse_buckets({name: flags.FLAGS[name].value for name in flags.FLAGS if name not in TEXT_FLAGS})
            keep_compiled()
            main()
        except KeyboardInterrupt:
            if TRACEBACK.value:
                raise
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except (OSError, ValueError, RuntimeError, FloatingPointError, MissingExtra) as error:
            if TRACEBACK.value:
                raise
            message = f"{_one_line(error)} (--traceback shows where)"
            hosts = sys.modules.get("avg_llava_jax.parallel.hosts")
            if hosts is None:  # JAX is not loaded, so there are no other processes
                _fail(message)
            hosts.leave(hosts.RESTART if isinstance(error, ConnectionError) else 2, message)

    app.run(guarded, flags_parser=parse)


def _fail(message: object) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
