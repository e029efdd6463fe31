"""What is added up in fp32 where parameters and activations are bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

from avg_llava_jax.models import avg_llava, language, linear

COUNT = 4096
"""Equal parts of a sum: in bfloat16 it would stand still at 256."""


def test_the_embedding_of_a_frequent_token_gets_its_whole_gradient():
    params = {"embed": jnp.ones((3, 2), jnp.bfloat16)}
    ids = jnp.ones((1, COUNT), int)
    grad = jax.jit(jax.grad(lambda p: jnp.sum(language.embed(p, ids).astype(jnp.float32))))(params)["embed"]
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad, [[0, 0], [COUNT, COUNT], [0, 0]])


def test_rows_that_are_packed_often_get_their_whole_gradient():
    """Text is row 0, the only visual token row 1, the newline row 2."""
    index = jnp.array([[0, 1, *[2] * COUNT]] * 2)
    params = {"image_newline": jnp.ones(4, jnp.bfloat16)}
    text, pyramid = jnp.ones((2, 1, 4), jnp.bfloat16), jnp.ones((2, 1, 1, 4), jnp.bfloat16)

    def total(params, text, pyramid):
        return jnp.sum(avg_llava.assemble(params, pyramid, text, index).astype(jnp.float32))

    grads = jax.jit(jax.grad(total, (0, 1, 2)))(params, text, pyramid)
    np.testing.assert_array_equal(grads[0]["image_newline"], [2 * COUNT] * 4)
    assert all(np.all(grad == 1) for grad in grads[1:])


def test_a_bias_gets_its_whole_gradient():
    """Summed in bfloat16, XLA's way on a CPU, it is a third too small."""
    layer, weights = linear.Linear(96), 1 + jax.random.uniform(jax.random.key(0), (16, 320, 96)).astype(jnp.bfloat16)
    params = {"kernel": jnp.zeros((3, 96), jnp.bfloat16), "bias": jnp.zeros(96, jnp.bfloat16)}

    @jax.jit
    @jax.grad
    def grad(params, x, weights):
        return jnp.sum((layer.apply({"params": params}, x) * weights).astype(jnp.float32))

    found = grad(params, jnp.ones((16, 320, 3), jnp.bfloat16), weights)["bias"].astype(jnp.float32)
    np.testing.assert_allclose(found, weights.astype(jnp.float32).sum((0, 1)), rtol=0.005)
