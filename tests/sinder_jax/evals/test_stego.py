import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from samples import error_of
from sinder_jax.evals import stego

DIM, CLASSES, CODES, BATCH = 12, 3, 7, 4
OPTIONS = stego.StegoOptions(
    stego.Row((0.8, 0.65, 0.9), (0.1, 0.2, 0.3)), samples=3, dropout=0.25, lr=2e-3
)


def batch_of(seed, size=(14, 15)):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, BATCH, 5, 6, DIM)) + rng.normal(size=DIM)
    labels = rng.integers(0, CLASSES, (BATCH, *size)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    return features.astype(np.float32), labels


def start(seed=0):
    return stego.init(jax.random.key(seed), DIM, CLASSES, CODES)


def draws_of(state, step):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
    return stego.draw(key, BATCH, DIM, OPTIONS)


def distance(one, other):
    """The largest difference of any number."""
    both = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in both)


# --- The paper's numbers --------------------------------------------------------------


def test_table_7():
    assert {name: (*row.weights, *row.shifts) for name, row in stego.TABLE.items()} == {
        ("cityscapes", "dinov2"): (0.90, 0.60, 1.00, 0.30, 0.20, 0.45),
        ("cityscapes", "dinov2_reg"): (0.80, 0.65, 0.90, 0.30, 0.20, 0.45),
        ("cityscapes", "sinder"): (0.80, 0.65, 0.90, 0.30, 0.45, 0.60),
        ("potsdam3", "dinov2"): (0.90, 0.60, 1.00, 0.30, 0.20, 0.45),
        ("potsdam3", "dinov2_reg"): (0.90, 0.60, 1.00, 0.30, 0.20, 0.45),
        ("potsdam3", "sinder"): (0.90, 0.60, 1.00, 0.40, 0.45, 0.45),
    }
    assert {name for _, name in stego.TABLE} == set(stego.BACKBONES)


@pytest.mark.parametrize(
    "dim, want",
    [(384, 201_740), (768, 698_252), (1024, 1_193_100), (1536, 2_576_012)],
)
def test_parameters_of_the_head(dim, want):
    state = jax.eval_shape(lambda: stego.init(jax.random.key(0), dim, 27))
    head = jax.tree.leaves(state.params.head)
    assert sum(x.size for x in head) == want
    assert state.params.linear.kernel.shape == (70, 27)
    assert state.params.centroids.shape == (27, 70)


def test_cluster_loss_of_the_specification():
    centroids = jnp.array([[1.0, 0], [0, 2], [-3, -4]])
    codes = jnp.array([[3.0, 4], [-1, -1]])
    assert stego.cluster_loss(codes, centroids) == pytest.approx(-0.894975, abs=1e-6)


def test_layers_start_as_pytorch_s_do():
    params = stego.init(jax.random.key(0), 256, 20).params
    for layer in params.head:
        for x in layer:
            assert 0.055 < abs(x).max() <= 1 / 16  # biases too
    bound = 1 / np.sqrt(70)
    assert 0.9 * bound < abs(params.linear.bias).max() <= bound
    assert float(params.centroids.std()) == pytest.approx(1, abs=0.1)


# --- PyTorch --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_stego():
    pytest.importorskip("torch")
    return pytest.importorskip("benchmarks.torch_stego")


def torch_step(baseline, draws, features, labels):
    torch = pytest.importorskip("torch")
    kept, coordinates, negatives, labels = (
        torch.tensor(np.array(x)) for x in (*draws, labels)
    )
    maps = torch.tensor(features).permute(0, 1, 4, 2, 3)
    found = baseline.step(kept, coordinates, negatives.long(), maps, labels.long())
    return [x.item() for x in found]


def test_training_equals_a_pytorch_loop(torch_stego):
    state, step = start(), stego.make_step(OPTIONS)
    baseline = torch_stego.Baseline(state.params, OPTIONS)
    for i in range(6):
        features, labels = batch_of(i)
        want = torch_step(baseline, draws_of(state, i), features, labels)
        state, found = step(state, *features, labels)
        np.testing.assert_allclose(found, want, atol=1e-5)
    moved = distance(start().params, state.params)
    # Adam turns the rounding of a small gradient into a part of a step.
    assert distance(baseline.params(), state.params) < 1e-5 < moved


def wrongly(draws, what):
    kept, coordinates, negatives = draws
    if what == "places of image and positive swapped":
        coordinates = coordinates[::-1]
    if what == "one place for both":
        coordinates = coordinates.at[1].set(coordinates[0])
    if what == "one dropout for all of an image":
        kept = jnp.repeat(kept[:, :1], 3, axis=1)
    if what == "one dropout for image and positive":
        kept = jnp.repeat(kept[:1], 2, axis=0)
    if what == "no dropout of the compared features":
        kept = kept.at[:, 2].set(True)
    if what == "one dropout for the whole batch":
        kept = jnp.repeat(kept[:, :, :1], BATCH, axis=2)
    if what == "other negatives":
        negatives = (negatives + 1) % BATCH
    if what == "each set of negatives alike":
        negatives = jnp.repeat(negatives[:1], len(negatives), axis=0)
    return stego.Draws(kept, coordinates, negatives)


@pytest.mark.parametrize(
    "what",
    [
        "places of image and positive swapped",
        "one place for both",
        "one dropout for all of an image",
        "one dropout for image and positive",
        "no dropout of the compared features",
        "one dropout for the whole batch",
        "other negatives",
        "each set of negatives alike",
    ],
)
def test_the_pytorch_loop_tells_other_draws(torch_stego, what):
    state, (features, labels) = start(), batch_of(0)
    baseline = torch_stego.Baseline(state.params, OPTIONS)
    wrong = wrongly(draws_of(state, 0), what)
    want = torch_step(baseline, wrong, features, labels)
    _, found = stego.make_step(OPTIONS)(state, *features, labels)
    assert np.abs(np.array(found) - want).max() > 1e-4


# --- Conventions ----------------------------------------------------------------------


def test_draws_are_what_the_original_draws():
    options = stego.StegoOptions(OPTIONS.row)
    draws = stego.draw(jax.random.key(0), 16, 384, options)
    assert draws.kept.shape == (2, 3, 16, 384)  # channels of an image, not elements
    share = draws.kept.mean((2, 3))
    np.testing.assert_allclose(share, 0.9, atol=0.02)
    flat = draws.kept.reshape(6, -1)
    both = (flat[:, None] & flat[None]).mean(2)
    np.testing.assert_allclose(both[~np.eye(6, dtype=bool)], 0.81, atol=0.03)
    assert draws.coordinates.shape == (2, 16, 11, 11, 2)
    assert -1 <= draws.coordinates.min() < -0.99 < 0.99 < draws.coordinates.max() < 1
    assert draws.negatives.shape == (5, 16)
    assert not (draws.negatives == jnp.arange(16)[None]).any()


def test_dropped_channels_are_zeros_and_the_others_longer():
    """What an image without the channels gives if no dropout is left."""
    state, (features, labels) = start(), map(jnp.asarray, batch_of(0))
    draws = draws_of(state, 0)
    every = jnp.ones_like(draws.kept)
    dropped = draws._replace(kept=every.at[0, :, :, :3].set(False))
    want = stego.losses(state.params, dropped, features, labels, OPTIONS)
    scaled = features.at[0, ..., :3].set(0) / 0.75
    plain = dataclasses.replace(OPTIONS, dropout=0.0)
    found = stego.losses(
        state.params, draws._replace(kept=every), scaled, labels, plain
    )
    np.testing.assert_allclose(found[1], want[1], atol=1e-6)


def test_no_gradient_of_the_probes_reaches_the_head():
    state, (features, labels) = start(), map(jnp.asarray, batch_of(0))
    draws = draws_of(state, 0)

    @jax.jit
    @jax.grad
    def slopes(params):
        terms = stego.losses(params, draws, features, labels, OPTIONS)[1]
        return terms.linear + terms.cluster

    found = slopes(state.params)
    assert not any(x.any() for x in jax.tree.leaves(found.head))
    assert all(x.any() for x in (*found.linear, found.centroids))


def test_weights_scale_their_terms():
    state, (features, labels) = start(), map(jnp.asarray, batch_of(0))
    row = stego.Row((2, 3, 5), OPTIONS.row.shifts)
    options = dataclasses.replace(OPTIONS, row=row)
    total, x = stego.losses(state.params, draws_of(state, 0), features, labels, options)
    want = 2 * x.negative + 3 * x.inter + 5 * x.intra + x.linear + x.cluster
    assert total == pytest.approx(float(want), abs=1e-6)


def test_three_learning_rates():
    """The first step of Adam is one learning rate, wherever there is a gradient."""
    state, (features, labels) = start(), batch_of(0)
    after, _ = stego.make_step(OPTIONS)(state, *features, labels)
    for name, rate in (("head", 2e-3), ("linear", 5e-3), ("centroids", 5e-3)):
        moved = distance(getattr(state.params, name), getattr(after.params, name))
        assert moved == pytest.approx(rate, rel=1e-3)


def test_codes_have_no_dropout_and_flip_with_the_features():
    state, (features, _) = start(), batch_of(0)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params.head)
    x = features[0].astype(np.float64)
    hidden = np.maximum(x @ head.hidden.kernel + head.hidden.bias, 0)
    want = x @ head.linear.kernel + head.linear.bias
    want = want + hidden @ head.output.kernel + head.output.bias
    found = stego.codes(state.params.head, features[0])
    np.testing.assert_allclose(found, want, atol=1e-5)
    flipped = stego.codes(state.params.head, features[0][:, :, ::-1])
    np.testing.assert_allclose(flipped[:, :, ::-1], found, atol=1e-6)


def test_a_state_that_was_stored_goes_on_with_the_same_bits():
    step = stego.make_step(OPTIONS)
    whole = start()
    for i in range(4):
        features, labels = batch_of(i)
        whole, _ = step(whole, *features, labels)
        if i == 1:
            kept = jax.tree.map(np.array, serialization.to_state_dict(whole))
    state = serialization.from_state_dict(start(seed=5), kept)
    for i in range(2, 4):
        features, labels = batch_of(i)
        state, _ = step(state, *features, labels)
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        assert np.array_equal(one, two)


# --- Neighbors ------------------------------------------------------------------------


def test_nearest_are_those_of_a_full_sort():
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(40, 6)).astype(np.float32)
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    want = np.argsort(-(unit @ unit.T), axis=1)[:, :30]
    found = stego.nearest(5 * pooled)
    assert np.array_equal(found, want) and (found[:, 0] == np.arange(40)).all()
    assert stego.nearest(pooled[:9]).shape == (9, 9)


# --- Mistakes -------------------------------------------------------------------------


def test_arrays_that_do_not_go_together_are_refused():
    state, step = start(), stego.make_step(OPTIONS)
    (x, y), labels = batch_of(0)
    assert "expected [B, h, w, 12]" in error_of(step, state, x[..., 1:], y, labels)
    assert "got positives (3, 5, 6, 12)" in error_of(step, state, x, y[1:], labels)
    assert "got labels (3, 14, 15)" in error_of(step, state, x, y, labels[1:])
    assert "expected integers" in error_of(step, state, x, y, labels * 1.0)
    said = error_of(step, state, x[:1], y[:1], labels[:1])
    assert "got 1 image, expected at least 2" in said


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"lr": 0.0}, "got lr=0.0, must be above 0"),
        ({"dropout": 1.0}, "got dropout=1.0"),
        ({"samples": 0}, "got samples=0"),
        ({"samples": 65}, "got samples=65, must be at least 1 and at most 64"),
        ({"negatives": 0}, "got negatives=0"),
        ({"row": stego.Row((1, 1, np.nan), (0, 0, 0))}, "three finite weights"),
        ({"row": stego.Row((1, -1, 1), (0, 0, 0))}, "three finite weights, at least 0"),
    ],
)
def test_options_out_of_range_are_refused(wrong, said):
    assert said in error_of(stego.StegoOptions, **{"row": OPTIONS.row, **wrong})
