import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax import attention

SHAPES = {
    "even": (1, 4, 10, 8),
    "odd heads": (1, 3, 7, 8),
    "images": (3, 2, 5, 4),
    "one token": (1, 2, 1, 4),
}


def heads_of(shape, count, scale=1.0):
    rng = np.random.default_rng(0)
    return [scale * rng.standard_normal(SHAPES[shape]) for _ in range(count)]


def softmax_attention(q, k, v):
    """In NumPy float64, token by token."""
    mixed = np.empty_like(q)
    for index in np.ndindex(q.shape[:3]):
        batch, head, _ = index
        logits = k[batch, head] @ q[index] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        mixed[index] = weights @ v[batch, head] / weights.sum()
    return mixed


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["", "large"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixing_is_softmax_attention(shape, scale):
    heads = heads_of(shape, 3, scale)
    with jax.enable_x64(True):
        got = attention.mix(*map(jnp.asarray, heads), "highest")
    # float64 rounding, of logits up to 900 times larger where they are large
    np.testing.assert_allclose(got, softmax_attention(*heads), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_written_gradient_is_the_derived_one(shape):
    with jax.enable_x64(True):
        *heads, d_mixed = map(jnp.asarray, heads_of(shape, 4))
        _, ours = jax.vjp(lambda *x: attention.mix(*x, "highest"), *heads)
        _, derived = jax.vjp(lambda *x: attention._forward("highest", *x), *heads)
        for got, want in zip(ours(d_mixed), derived(d_mixed), strict=True):
            # float64 rounding of sums of up to 10 products
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_all_at_once_agrees_with_two_after_two():
    heads = [jnp.asarray(x, jnp.float32) for x in heads_of("even", 3)]
    at_once = attention._forward("highest", *heads)
    # float32 rounding of sums of 10
    np.testing.assert_allclose(attention.mix(*heads, "highest"), at_once, atol=1e-6)
