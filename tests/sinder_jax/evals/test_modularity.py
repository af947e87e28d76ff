import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import modularity

# --- The specification's numbers ------------------------------------------------------

X = np.array([(1, 0), (0.6, 0.8), (0, 1)])
CODES = np.array([(1.0, 0), (0, 1)])
X_SECOND = np.array([(1, 0), (-1, 0.2), (0, 1), (0.5, -0.5)])
CODES_SECOND = np.array([(0.3, 0.1), (-0.2, 0.4), (0.1, -0.3)])


def reference(x, codebook, change=""):
    """The six formulas of an image in float64; `change` breaks a convention."""

    def unit(a):
        return a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)

    codes = codebook if change == "raw codes" else unit(codebook)
    edges = np.maximum(unit(x) @ unit(x).T, 0)
    if change != "own edges":
        np.fill_diagonal(edges, 0)
    if change == "raw tokens":
        edges = np.maximum(x @ x.T, 0) * (1 - np.eye(len(x)))
    degrees, e = edges.sum(1), edges.sum()
    w = edges - (0 if change == "no degrees" else np.outer(degrees, degrees) / e)
    if change == "no diagonal":
        np.fill_diagonal(w, 0)
    c = unit(x) @ codes.T
    c = c if change == "negative cosines" else np.maximum(c, 0)
    products = c[:, None] * c[None]
    sharpness = 1 if change == "no sharpness" else 0.1
    delta = np.tanh(products / sharpness).max(-1)
    if change == "sum over codes":
        delta = np.tanh(products.sum(-1) / sharpness)
    total = 1 if change == "not divided" else e
    return {"e": e, "w": w, "c": c, "delta": delta, "loss": -(w * delta).sum() / total}


CHANGES = (
    "raw codes",
    "own edges",
    "raw tokens",
    "no degrees",
    "no diagonal",
    "negative cosines",
    "no sharpness",
    "sum over codes",
    "not divided",
)


def test_the_reference_has_the_specified_intermediates():
    found = reference(X, CODES)
    assert found["e"] == pytest.approx(2.8)
    want = [[-0.12857, 0.3, -0.17143], [0.3, -0.7, 0.4], [-0.17143, 0.4, -0.22857]]
    np.testing.assert_allclose(found["w"], want, atol=5e-6)
    np.testing.assert_allclose(found["w"].sum(1), 0, atol=1e-15)
    np.testing.assert_allclose(found["c"], [[1, 0], [0.6, 0.8], [0, 1]], atol=1e-15)
    want = [[1, 0.99999, 0], [0.99999, 0.99999, 1], [0, 1, 1]]
    np.testing.assert_allclose(found["delta"], want, atol=5e-6)
    assert reference(X_SECOND, CODES_SECOND)["e"] == pytest.approx(1.80645, abs=5e-6)


@pytest.mark.parametrize(
    "x, codes, want", [(X, CODES, -0.1224475), (X_SECOND, CODES_SECOND, -0.1797001)]
)
def test_modularity_loss(x, codes, want):
    # The specified numbers are the original's, in float32.
    assert reference(x, codes)["loss"] == pytest.approx(want, abs=3e-7)
    found = modularity.modularity_loss(np.float32(x), np.float32(codes))
    assert found == pytest.approx(want, abs=3e-7)


def test_gradient_of_the_modularity_loss():
    """Its 1.22445 is there only if max(C, 0) has the slope 1 at 0, as `clamp` has."""
    by_codes = jax.grad(modularity.modularity_loss, argnums=1)
    gradient = by_codes(jnp.float32(X), jnp.float32(CODES))
    np.testing.assert_allclose(gradient, [[0, 1.22445], [0.00003, 0]], atol=5e-6)


def grid(side):
    return jnp.arange(float(side * side)).reshape(1, side, side, 1)


def sampled(side, order):
    order = jnp.asarray(order, jnp.int32)[None]
    return modularity.sample_cells(grid(side), order)[0, :, 0].tolist()


def test_cells_are_sampled_as_specified():
    assert sampled(8, [0, 5, 15, 3]) == [0, 13, 59, 39]
    first = sampled(23, [0] * 25)
    assert first[:7] == [0, 4, 8, 12, 16, 92, 96] and first[-1] == 384
    assert sampled(23, [15] * 25)[-5:] == [440, 444, 448, 452, 456]


# --- Random numbers -------------------------------------------------------------------


def random_batch(seed=0, images=3, n=9, dim=6, codes=11):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, n, dim))
    return x.astype(np.float32), rng.normal(size=(codes, dim)).astype(np.float32)


def loss_of(x, codebook, change=""):
    each = [reference(np.float64(one), np.float64(codebook), change) for one in x]
    return np.mean([one["loss"] for one in each])


def test_a_batch_is_the_mean_of_its_images():
    x, codebook = random_batch()
    found = modularity.modularity_loss(x, codebook)
    assert found == pytest.approx(loss_of(x, codebook), abs=1e-6)
    assert modularity.modularity_loss(x[0], codebook) == pytest.approx(
        loss_of(x[:1], codebook), abs=1e-6
    )


@pytest.mark.parametrize("change", CHANGES)
def test_each_convention_matters(change):
    x, codebook = random_batch()
    found = float(modularity.modularity_loss(x, codebook))
    assert abs(found - loss_of(x, codebook, change)) > 1e-3


def test_gradients_are_those_of_finite_differences():
    """In float64, where the reference is smooth around a random point."""
    x, codebook = random_batch(1, images=2, n=4, codes=5)
    gradient = jax.grad(modularity.modularity_loss, argnums=1)(x, codebook)
    step, wanted = 1e-6, np.zeros(codebook.shape)
    for place in np.ndindex(codebook.shape):
        moved = np.zeros(codebook.shape)
        moved[place] = step
        up, down = (loss_of(x, codebook + s * moved) for s in (1, -1))
        wanted[place] = (up - down) / (2 * step)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_only_the_codes_that_pairs_share_move():
    x = jnp.array([[1.0, 0.1], [1.0, 0.3]])
    codebook = jnp.array([[1.0, 0.2], [0.2, 1.0]])  # the first one is nearer to both
    gradient = jax.grad(modularity.modularity_loss, argnums=1)(x, codebook)
    assert (gradient[1] == 0).all()
    by_tokens = jax.grad(modularity.modularity_loss)(x, codebook)
    assert (by_tokens == 0).all()


@pytest.mark.parametrize("x", [[[1.0, 0]], [[1.0, 0], [-1, 0]], [[0.0, 0], [0, 0]]])
def test_an_image_without_edges_counts_as_0(x):
    loss, gradient = jax.value_and_grad(modularity.modularity_loss, argnums=1)(
        jnp.array(x), jnp.eye(2)
    )
    assert loss == 0 and (gradient == 0).all()


def test_tokens_of_another_width_are_refused():
    said = error_of(modularity.modularity_loss, jnp.ones((4, 3)), jnp.ones((5, 2)))
    assert "(4, 3)" in said and "[n, 2]" in said


# --- Codes and cells ------------------------------------------------------------------


def test_quantized_tokens_keep_the_length_of_their_code():
    codebook = jnp.array([[0.001, 0.0], [0.0, 5.0], [0.0, 9.0]])
    tokens = jnp.array([[[3.0, 1.0], [1.0, 3.0]]])
    vectors, codes = modularity.quantize(tokens, codebook)
    assert codes.tolist() == [[0, 1]]  # the first of equal ones
    np.testing.assert_array_equal(vectors, codebook[codes])


def test_orders_are_drawn_uniformly():
    order = modularity.draw_order(jax.random.key(0), 400, 23, 23)
    assert order.shape == (400, 25)
    shares = np.bincount(np.ravel(order), minlength=17) / order.size
    assert shares[16] == 0
    np.testing.assert_allclose(shares[:16], 1 / 16, atol=0.01)  # 4 deviations


def test_maps_that_share_an_order_stay_aligned():
    order = modularity.draw_order(jax.random.key(1), 2, 9, 6)
    maps = jnp.arange(2 * 9 * 6).reshape(2, 9, 6, 1)
    found = modularity.sample_cells(maps, order)
    both = modularity.sample_cells(jnp.concatenate([maps, 2 * maps], -1), order)
    np.testing.assert_array_equal(both[..., 1:], 2 * found)
    assert "[2, 2]" in error_of(modularity.sample_cells, maps, order[:, :1])


def test_codebooks_start_within_their_range():
    codebook = modularity.init_codebook(jax.random.key(0), 2_048, 8)
    assert 0.99 / 2_048 < np.abs(codebook).max() <= 1 / 2_048
