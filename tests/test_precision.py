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
    layer = linear.Linear(2)
    params = {"kernel": jnp.zeros((3, 2), jnp.bfloat16), "bias": jnp.zeros(2, jnp.bfloat16)}

    @jax.jit
    @jax.grad
    def grad(params):
        return jnp.sum(layer.apply({"params": params}, jnp.ones((2, COUNT, 3), jnp.bfloat16)).astype(jnp.float32))

    np.testing.assert_array_equal(grad(params)["bias"], [2 * COUNT] * 2)


def test_logits_are_not_rounded(tiny, params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["language"])
    hidden = jax.random.normal(jax.random.key(0), (2, 5, tiny.language.width)).astype(jnp.bfloat16)
    logits = language.unembed(tiny.language, half, hidden)
    exact = hidden.astype(jnp.float32) @ half["embed"].astype(jnp.float32).T
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=1e-5)

    def total(hidden):
        return jnp.sum(jax.nn.logsumexp(language.unembed(tiny.language, half, hidden), axis=-1))

    grad = jax.grad(total)(hidden)
    wanted = jax.grad(lambda hidden: jnp.sum(jax.nn.logsumexp(hidden @ half["embed"].astype(jnp.float32).T, axis=-1)))(
        hidden.astype(jnp.float32)
    )
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(grad, wanted, rtol=0.02, atol=0.01)
