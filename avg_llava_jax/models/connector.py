"""The connector projects patch features (E wide) into the language model's embedding space (D wide)."""

import flax.linen as nn
import jax
from jaxtyping import Array, ArrayLike, Float


class Connector(nn.Module):
    """Two-layer MLP with exact GELU."""

    width: int

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*M E"]) -> Float[Array, "*M D"]:
        x = nn.Dense(self.width, name="up")(x)
        return nn.Dense(self.width, name="down")(jax.nn.gelu(x, approximate=False))
