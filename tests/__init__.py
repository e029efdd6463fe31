"""Before anything of the package is imported: shapes and dtypes in signatures are checked whenever tests call them."""

import os
import pathlib
import typing

from flax.linen import linear
from jaxtyping import install_import_hook

typing.runtime_checkable(linear.PromoteDtypeFn)  # else beartype refuses `language.Linear`, which inherits a field of it
CHECKED = [
    "avg_llava_jax.models",
    "avg_llava_jax.training.losses",
    "avg_llava_jax.training.rglf",
]
install_import_hook(CHECKED, "beartype.beartype")

# Programs are compiled once for all tests, their processes and the commands that they start.
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Most of the suite's time is XLA's. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs as users run them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
