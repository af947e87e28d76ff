import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.evals import bilinear


def test_bilinear_numbers():
    row = jnp.arange(4.0).reshape(1, 4, 1)
    larger = bilinear.resize(row, (1, 6)).ravel()
    np.testing.assert_allclose(larger, [0, 0.5, 7 / 6, 11 / 6, 2.5, 3], atol=1e-6)
    smaller = bilinear.resize(row, (1, 3)).ravel()
    np.testing.assert_allclose(smaller, [1 / 6, 1.5, 17 / 6], atol=1e-6)


@pytest.mark.parametrize("old, new", [((5, 7), (20, 23)), ((9, 8), (4, 8))])
def test_resize_equals_pytorch(old, new):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(*old, 3)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.tensor(x).permute(2, 0, 1)[None], new, mode="bilinear"
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(bilinear.resize(x, new), want, atol=2e-6)


def test_integers_are_resized_like_floats():
    got = bilinear.resize(np.arange(4).reshape(1, 4, 1), (1, 6))[0, :, 0]
    # Centers at 2/3·(j + ½) - ½: 1/6 beyond the pixel before or below the one after.
    want = [0, 0.5, 7 / 6, 11 / 6, 2.5, 3]
    np.testing.assert_allclose(got, want, rtol=1e-6)
