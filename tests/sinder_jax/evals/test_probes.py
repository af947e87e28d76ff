import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import probes

CENTROIDS = jnp.array([[1.0, 0], [0, 2], [-3, -4]])
CODES = jnp.array([[3.0, 4], [-1, -1]])


def batch_of(classes=5, dim=6, grid=(4, 5), size=(19, 20)):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(3, *grid, dim)).astype(np.float32)
    labels = rng.integers(-1, classes + 1, (3, *size)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.2] = 255
    return jnp.asarray(codes), jnp.asarray(labels)


def torch_loss(torch, linear, codes, labels):
    """Upsampled as a whole, then pixels with a label in range are picked."""
    weight, bias, x = (
        torch.tensor(np.array(a)).requires_grad_() for a in (*linear, codes)
    )
    logits = (x @ weight + bias).permute(0, 3, 1, 2)
    size = labels.shape[1:]
    logits = torch.nn.functional.interpolate(logits, size, mode="bilinear")
    logits = logits.permute(0, 2, 3, 1).reshape(-1, len(bias))
    labels = torch.tensor(np.array(labels)).long().ravel()
    known = (labels >= 0) & (labels < len(bias))
    loss = torch.nn.functional.cross_entropy(logits[known], labels[known])
    loss.backward()
    return loss.item(), [a.grad.numpy() for a in (weight, bias, x)]


def test_linear_loss_and_its_gradient_equal_pytorch():
    torch = pytest.importorskip("torch")
    codes, labels = batch_of()
    linear = probes.init_linear(jax.random.key(1), 6, 5)
    want, slopes = torch_loss(torch, linear, codes, labels)

    def twice(linear, codes):  # a cotangent other than 1
        return 2 * probes.linear_loss(linear, codes, labels)

    loss, found = jax.value_and_grad(twice, argnums=(0, 1))(linear, codes)
    assert float(loss) == pytest.approx(2 * want, rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), slopes, strict=True):
        # Sums over 1,140 pixels in float32.
        np.testing.assert_allclose(ours, 2 * theirs, atol=1e-6)


def test_labels_out_of_range_do_not_count_whatever_their_number():
    codes, labels = batch_of()
    linear = probes.init_linear(jax.random.key(1), 6, 5)
    want = probes.linear_loss(linear, codes, labels)
    outside = (labels < 0) | (labels >= 5)
    for other in (-1, 5, 255):
        moved = jnp.where(outside, other, labels)
        assert probes.linear_loss(linear, codes, moved) == want
    small = jnp.where(outside, 255, labels).astype(jnp.uint8)
    assert probes.linear_loss(linear, codes, small) == want
    moved = jnp.where(outside, 4, labels)
    assert probes.linear_loss(linear, codes, moved) != want


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    codes, labels = batch_of()
    linear = probes.init_linear(jax.random.key(1), 6, 5)
    loss, slopes = jax.value_and_grad(probes.linear_loss)(
        linear, codes, jnp.full_like(labels, 255)
    )
    assert loss == 0 and not any(x.any() for x in slopes)


def test_the_loss_never_holds_the_pixels_of_a_batch():
    """Of Cityscapes, 16 images of 392 pixels and 27 classes: 266 MB of logits."""
    linear = probes.Linear(*(jax.ShapeDtypeStruct(s, "f4") for s in ((70, 27), (27,))))
    codes = jax.ShapeDtypeStruct((16, 28, 28, 70), jnp.float32)
    labels = jax.ShapeDtypeStruct((16, 392, 392), jnp.uint8)
    step = jax.jit(jax.value_and_grad(probes.linear_loss, argnums=(0, 1)))
    used = step.lower(linear, codes, labels).compile().memory_analysis()
    image = 392 * 392 * 27 * 4
    assert used.temp_size_in_bytes < 4 * image  # a quarter of the batch's logits


def test_cluster_probabilities_of_the_specification():
    found = probes.cluster_log_probabilities(CODES, CENTROIDS, 2.0)
    want = [[-0.92924, -0.52924, -4.12924], [-3.45910, -3.45910, -0.06498]]
    np.testing.assert_allclose(found, want, atol=1e-5)
    other = probes.cluster_log_probabilities(CODES, CENTROIDS, 3.0)
    assert abs(other - jnp.array(want)).max() > 0.1


def test_log_probabilities_are_those_of_a_softmax():
    linear = probes.init_linear(jax.random.key(1), 2, 3)
    found = np.asarray(probes.log_probabilities(linear, CODES), np.float64)
    kernel, bias = (np.asarray(x, np.float64) for x in linear)
    scores = np.exp(np.asarray(CODES, np.float64) @ kernel + bias)
    want = scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(found), want, rtol=1e-6)


def test_a_new_layer_is_drawn_as_pytorch_draws_it():
    linear = probes.init_linear(jax.random.key(0), 64, 200)
    for x in linear:
        assert -1 / 8 < x.min() < -0.12 and 0.12 < x.max() < 1 / 8
        assert abs(x.std() - 0.125 / np.sqrt(3)) < 0.005


def test_zeros_have_a_finite_gradient():
    """PyTorch's: the slope over the least norm."""
    slope = jax.grad(lambda x: probes.normalize(x, 1e-3)[0])(jnp.zeros(2))
    np.testing.assert_allclose(slope, [1e3, 0], rtol=1e-6)


def test_classes_that_no_mask_can_hold_are_refused():
    said = error_of(probes.init_linear, jax.random.key(0), 3, 256)
    assert "got codes of width 3 and 256 classes" in said
