"""spectral_map.py against the maps of defects.py, quadrature and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import SMALL, random_params
from sinder_jax import defects, factor, kernels, spectral_map


def made(kind, reach=0.0, seed=0):
    """A block of a random model: its weights, its spectral map and σ."""
    config = SMALL[kind]
    params = jax.tree.map(lambda x: 0.2 * x, random_params(config, seed))
    weights = kernels.weights(config, params, 0)
    matrices = (weights.v, weights.proj, weights.first, weights.last)
    factors = [factor.factorize_kernel(matrix.T) for matrix in matrices]
    far = reach * np.random.default_rng(1).normal(size=config.embed_dim)
    block = spectral_map.of_block(weights, factors, far)
    return weights, block, [each.sigma.astype(np.float64) for each in factors]


def rebuilt(weights, block, s):
    """The weights with kernels U·diag(s)·Vᵀ."""
    four = [u * x @ v.T for u, x, v in zip(block.u, s, block.v, strict=True)]
    names = ("v", "proj", "first", "last")
    return weights._replace(**dict(zip(names, four, strict=True)))


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_apply_is_the_block_map_for_any_singular_values(kind):
    weights, block, sigma = made(kind)
    rng = np.random.default_rng(2)
    s = [x * rng.uniform(0.2, 2.0, x.shape) for x in sigma]
    with jax.enable_x64(True):
        got = spectral_map.apply(block, s, jnp.eye(len(weights.v)))
    now = rebuilt(weights, block, s)
    want = defects.ffn_map(now) @ defects.attention_map(now)
    # U and V are stored as float32, and orthogonal to 1e-7 only.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_slopes_are_the_mean_derivatives_of_inputs_that_reach_out(kind):
    weights, block, sigma = made(kind, reach=1.0)
    weights = weights._replace(bias=weights.bias - 2.0)  # a gate mostly closed
    block = block.replace(bias=weights.bias)
    rng = np.random.default_rng(3)
    count, width = 200_000, len(weights.v)
    x = rng.normal(size=(count, width)) + np.outer(rng.normal(size=count), block.reach)
    hidden = x @ weights.first[:1].T + weights.bias[:1]
    with jax.enable_x64(True):
        slopes = np.asarray(spectral_map.hidden_slopes(block, sigma[2]))
        if kind == "swiglu":
            half = len(weights.first) // 2
            value = x @ weights.first[half] + weights.bias[half]
            gate = hidden[:, 0]
            want = [
                jnp.mean(jax.vmap(jax.grad(jax.nn.silu))(gate) * value),
                jnp.mean(jax.nn.silu(gate)),
            ]
        else:
            gelu = jax.grad(lambda a: jax.nn.gelu(a, approximate=False))
            want = [jnp.mean(jax.vmap(gelu)(hidden[:, 0]))]
    # Random probes: 5 standard errors of means of order 1 (SwiGLU's values: 3).
    np.testing.assert_allclose(slopes[:, 0], want, atol=5 * 3 / np.sqrt(count))


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_gradients_are_those_of_finite_differences(kind):
    weights, block, sigma = made(kind, reach=0.4)
    rng = np.random.default_rng(4)
    x, a = rng.normal(size=(2, len(weights.v), 3))
    step = [rng.normal(size=s.shape) for s in sigma]
    with jax.enable_x64(True):

        def along(t):
            s = [one + t * d for one, d in zip(sigma, step, strict=True)]
            return jnp.sum(
                jnp.asarray(a) * spectral_map.apply(block, s, jnp.asarray(x))
            )

        got, h = jax.grad(along)(0.0), 1e-5
        want = (along(h) - along(-h)) / (2 * h)
    # Central differences: h² and 1e-16/h.
    assert got == pytest.approx(float(want), rel=1e-6)


def test_a_gate_of_zeros_has_finite_gradients():
    _, block, sigma = made("swiglu")
    u = [np.array(each) for each in block.u]
    u[2][0] = 0.0
    block = dataclasses.replace(block, u=tuple(u))
    with jax.enable_x64(True):
        of = jax.grad(lambda s: jnp.sum(spectral_map.hidden_slopes(block, s)))
        assert np.isfinite(of(jnp.asarray(sigma[2]))).all()
