"""Before anything of the package is imported: shapes and dtypes in signatures are checked whenever tests call them."""

import importlib.metadata
import os
import pathlib
import typing

# Programs are compiled once for all tests, their processes and the commands that they start. JAX reads these variables
# when it is imported, so they are set first.
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
# Most of the suite's time is XLA's. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs as users run them.
optimized = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "1"
# XLA ends the process at a flag that it does not know, so these are for the release that they were tried with.
if not optimized and importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older emitter of loops compiles a training step on a CPU in a third of the time.
    quick = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*quick, *(flag for flag in given if flag not in quick)])

from flax.linen import linear  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

typing.runtime_checkable(linear.PromoteDtypeFn)  # else beartype refuses `language.Linear`, which inherits a field of it
CHECKED = [
    "avg_llava_jax.models",
    "avg_llava_jax.training.losses",
    "avg_llava_jax.training.rglf",
]
install_import_hook(CHECKED, "beartype.beartype")
