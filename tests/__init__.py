"""Before anything of the package is imported: shapes and dtypes in signatures are checked whenever tests call them."""

from jaxtyping import install_import_hook

CHECKED = ["avg_llava_jax.training.losses", "avg_llava_jax.training.rglf"]
install_import_hook(CHECKED, "beartype.beartype")
