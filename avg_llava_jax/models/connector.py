"""The connector projects patch features (E wide) into the language model's embedding space (D wide)."""

import flax.linen as nn
import jax
from jaxtyping import Array, ArrayLike, Float

from avg_llava_jax.models.linear import Linear


class Connector(nn.Module):
    """Two-layer MLP with exact GELU."""

    width: int

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*M E"]) -> Float[Array, "*M D"]:
        x = Linear(self.width, name="up")(x)
        return Linear(self.width, name="down")(jax.nn.gelu(x, approximate=False))
