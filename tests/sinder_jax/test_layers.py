"""The layers of a factored kernel: against the dense product, and by gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax import factor, layers

LAYER_SHAPES = {"wide": (6, 20), "tall": (20, 6), "square": (9, 9)}


def random_layer(width_in, width_out):
    """Factors, ε and a bias of one layer; float64 NumPy."""
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((width_in, width_out))
    v, sigma, ut = np.linalg.svd(kernel, full_matrices=False)
    eps = 0.3 * rng.standard_normal(sigma.shape)
    return ut.T, sigma, v, eps, rng.standard_normal(width_out)


@pytest.mark.parametrize("batch", [(), (2, 5)], ids=["token", "images"])
@pytest.mark.parametrize("shape", LAYER_SHAPES)
def test_factored_layers_agree_with_the_dense_product(shape, batch):
    width_in, width_out = LAYER_SHAPES[shape]
    u, sigma, v, eps, bias = random_layer(width_in, width_out)
    x = np.random.default_rng(4).standard_normal((*batch, width_in))
    kernel = v @ np.diag(sigma + eps) @ u.T
    expected = x @ kernel + bias
    single = functools.partial(jnp.asarray, dtype=jnp.float32)
    rest = {
        "factors": {"u": single(u), "v": single(v)},
        "frozen": {"bias": single(bias)},
    }
    spectral = layers.SpectralDense(width_out).apply(
        {"params": {"s": single(sigma + eps)}, **rest}, single(x)
    )
    merged = layers.MergedDense(width_out).apply(
        {
            "params": {"eps": single(eps)},
            "merged": {"kernel": single(kernel)},
            "frozen": rest["frozen"],
            "factors": rest["factors"] | {"sigma": single(sigma)},
        },
        single(x),
    )
    assert spectral.shape == merged.shape == expected.shape
    # sums of up to 20 float32 products of size up to 5
    np.testing.assert_allclose(spectral, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-5)


def test_layers_initialize_to_orthonormal_factors_and_agree():
    """s = 1 and ε = 0 are the same layer when drawn from the same key."""
    x = jnp.asarray(np.random.default_rng(5).standard_normal((4, 10)), jnp.float32)
    outputs = []
    for layer, trained in ((layers.SpectralDense, "s"), (layers.MergedDense, "eps")):
        y, variables = layer(7).init_with_output(jax.random.key(1), x)
        assert set(variables["params"]) == {trained}
        for side in "uv":
            basis = variables["factors"][side]
            np.testing.assert_allclose(basis.T @ basis, np.eye(7), atol=1e-6)
        outputs.append(y)
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("smallest", [1.0, 1e-9], ids=["even", "with a small value"])
@pytest.mark.parametrize("known", [False, True], ids=["computed", "known"])
@pytest.mark.parametrize("batch", [(), (2, 5)], ids=["token", "images"])
@pytest.mark.parametrize("shape", LAYER_SHAPES)
def test_merged_product_has_the_gradient_of_the_explicit_product(
    shape, batch, known, smallest
):
    """By x and by ε, against autodiff through x·V·diag(σ + ε)·Uᵀ in float64."""
    u, sigma, v, eps, _ = random_layer(*LAYER_SHAPES[shape])
    sigma[-1], eps[-1] = smallest * sigma[-1], smallest * eps[-1]
    rng = np.random.default_rng(6)
    x = rng.standard_normal((*batch, len(v)))
    weights = rng.standard_normal((*batch, len(u)))
    with jax.enable_x64(True):

        def merged(x, eps, u, v):
            kernel = jax.lax.stop_gradient(factor.merge_kernel(u, sigma + eps, v))
            y = jax.lax.stop_gradient(x @ kernel) if known else None
            y = layers.merged_product(
                "highest", x, kernel, u, jnp.asarray(sigma), v, eps, y
            )
            return jnp.sum(jnp.tanh(y) * weights)

        def explicit(x, eps):
            y = x @ v @ jnp.diag(sigma + eps) @ u.T
            return jnp.sum(jnp.tanh(y) * weights)

        arguments = [jnp.asarray(a) for a in (x, eps, u, v)]
        *got, by_u, by_v = jax.grad(merged, argnums=(0, 1, 2, 3))(*arguments)
        want = jax.grad(explicit, argnums=(0, 1))(*arguments[:2])
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == np.float64
            # float64 rounding of sums of up to 20 products
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        # ε belongs to its basis, which nothing trains
        assert not by_u.any() and not by_v.any()
