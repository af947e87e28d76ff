"""The linear probe, against PyTorch's own loop and the numbers of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import linear

RATES = (4e-5, 8e-3, 0.4)


def data(steps, batch=24, dim=12, classes=7, seed=0):
    """Features and labels of each step; features predict labels, as a backbone's do."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((classes, dim)).astype(np.float32)
    labels = rng.integers(0, classes, (steps, batch)).astype(np.int32)
    noise = rng.standard_normal((steps, batch, dim)).astype(np.float32)
    return centers[labels] + noise, labels


def train(state, step, features, labels):
    losses = []
    for x, y in zip(features, labels, strict=True):
        state, loss = step(state, x, y)
        losses.append(loss)
    return state, np.array(losses)


# --- Features -------------------------------------------------------------------------


def test_features_are_the_example_of_the_original():
    blocks = jnp.arange(1, 5, dtype=jnp.float32)
    cls = jnp.broadcast_to(blocks[:, None, None], (4, 1, 2))
    patches = 10 * blocks[:, None, None, None, None] + jnp.arange(3.0).reshape(
        1, 1, 1, 3, 1
    )
    found = linear.features(cls, jnp.broadcast_to(patches, (4, 1, 1, 3, 2)))
    assert list(found) == list(linear.KINDS)
    assert {kind: x[0].tolist() for kind, x in found.items()} == {
        (1, False): [4, 4],
        (1, True): [4, 4, 41, 41],
        (4, False): [1, 1, 2, 2, 3, 3, 4, 4],
        (4, True): [1, 1, 2, 2, 3, 3, 4, 4, 41, 41],
    }


def test_features_are_float32_whatever_the_tokens_are():
    cls = jnp.full((4, 2, 3), 1 / 3, jnp.float16)
    found = linear.features(cls, jnp.ones((1, 2, 4, 4, 3), jnp.float16))
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


def test_fewer_than_four_blocks_are_refused():
    cls = jnp.ones((2, 1, 3))
    message = error_of(linear.features, cls, jnp.ones((2, 1, 2, 2, 3)))
    assert "2 blocks" in message


# --- Steps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.4),
        (1, 0.39999999368),
        (1250, 0.39021130),
        (3125, 0.34142136),
        (6250, 0.2),
        (12_499, 6.3165e-9),
        (12_500, 0),
        (13_000, 0),
    ],
)
def test_learning_rate_falls_by_a_cosine(step, rate):
    got = float(0.4 * linear.cosine(step, 12_500))
    assert got == pytest.approx(rate, rel=2e-5, abs=1e-15)


def test_learning_rates_are_for_a_batch_of_256():
    got = linear.scaled(linear.BASE_LEARNING_RATES, 1024)
    want = [4e-5, 8e-5, 2e-4, 4e-4, 8e-4, 2e-3, 4e-3, 8e-3, 2e-2, 4e-2, 8e-2, 0.2, 0.4]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert len(set(np.float32(linear.scaled(linear.BASE_LEARNING_RATES, 128)))) == 13


def test_velocity_is_pytorchs():
    """Gradient 1, rate 0.1, weight 0: -0.1, -0.29, -0.561."""
    # One feature and two classes: far apart, the softmax does not move.
    state = linear.init(jax.random.key(0), 1, 2, [0.1])
    bias = jnp.array([[100.0, -100.0]])
    state = state.replace(kernel=jnp.zeros((1, 1, 2)), bias=bias)
    step = linear.make_step(10**9)  # the rate stays
    weights = []
    for _ in range(3):
        state, _ = step(state, jnp.ones((1, 1)), jnp.array([1]))
        weights.append(float(state.kernel[0, 0, 0]))
    np.testing.assert_allclose(weights, [-0.1, -0.29, -0.561], rtol=1e-6)


def test_losses_are_a_pytorch_loops_for_200_steps():
    torch = pytest.importorskip("torch")
    features, labels = data(200)
    state = linear.init(jax.random.key(1), 12, 7, RATES)
    heads, optimizers = [], []
    for k, rate in enumerate(RATES):
        head = torch.nn.Linear(12, 7)
        with torch.no_grad():
            head.weight.copy_(torch.tensor(np.array(state.kernel[k].T)))
            head.bias.zero_()
        heads.append(head)
        optimizers.append(torch.optim.SGD(head.parameters(), rate, momentum=0.9))
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, 200) for each in optimizers
    ]
    theirs = []
    for x, y in zip(torch.tensor(features), torch.tensor(labels).long(), strict=True):
        losses = [torch.nn.functional.cross_entropy(head(x), y) for head in heads]
        for each in optimizers:
            each.zero_grad()
        sum(losses).backward()
        for each in (*optimizers, *schedules):
            each.step()
        theirs.append([loss.item() for loss in losses])
    state, ours = train(state, linear.make_step(200), features, labels)
    assert ours[-20:, 2].mean() < 0.5 * ours[0, 2]  # it learned
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # 2e-6 found
    weights = [head.weight.detach().numpy().T for head in heads]
    np.testing.assert_allclose(state.kernel, weights, atol=1e-4)


def test_each_of_the_52_heads_trains_as_alone():
    rates = linear.scaled(linear.BASE_LEARNING_RATES, 1024)
    step = linear.make_step(6)
    for number, kind in enumerate(linear.KINDS):
        width = 6 * (kind[0] + kind[1])
        features, labels = data(6, dim=width, seed=number)
        key = jax.random.key(number)
        _, together = train(linear.init(key, width, 7, rates), step, features, labels)
        alone = [
            train(linear.init(key, width, 7, [rate]), step, features, labels)[1][:, 0]
            for rate in rates
        ]
        np.testing.assert_array_equal(together.T, alone)  # not only to 1e-5


def test_heads_start_apart_from_each_other():
    kernel = np.array(linear.init(jax.random.key(0), 50, 40, RATES).kernel)
    assert abs(kernel.std() - 0.01) < 3e-4
    assert abs(np.corrcoef(kernel.reshape(3, -1))[0, 1]) < 0.1


def test_the_first_loss_is_that_of_guessing():
    features, labels = data(1, classes=1000)
    state = linear.init(jax.random.key(0), 12, 1000, RATES)
    _, losses = linear.make_step(5)(state, features[0], labels[0])
    np.testing.assert_allclose(losses, np.log(1000), atol=0.02)


# --- Results --------------------------------------------------------------------------


def heads_with(logits):
    """Heads that give these logits [K, C] for the feature 1."""
    state = linear.init(jax.random.key(0), 1, len(logits[0]), [0.1] * len(logits))
    return state.replace(
        kernel=jnp.zeros_like(state.kernel), bias=jnp.asarray(logits, jnp.float32)
    )


def test_ranks_count_what_is_preferred():
    state = heads_with([[3, 1, 2], [1, 1, 1], [np.nan] * 3])
    got = linear.ranks(state, jnp.ones((3, 1)), jnp.arange(3))
    assert got.tolist() == [[0, 2, 1], [0, 1, 2], [3, 3, 3]]


def test_ranks_are_pytorchs_top_five():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    state = linear.init(jax.random.key(0), 4, 9, RATES)
    x = rng.standard_normal((50, 4)).astype(np.float32)
    y = rng.integers(0, 9, 50)
    got = np.array(linear.ranks(state, x, y)) < 5
    for k in range(3):
        logits = torch.tensor(x @ np.array(state.kernel[k]))
        top = logits.topk(5).indices.numpy()
        assert np.array_equal(got[k], (top == y[:, None]).any(axis=1))


def test_of_equal_heads_the_first_one_is_best():
    accuracy = {
        (4, True): np.array([0.9, 0.9]),
        (1, True): np.array([0.2, 0.9]),
        (1, False): np.array([0.5, 0.8]),
    }
    assert linear.best(accuracy) == ((1, True), 1)


# --- Mistakes -------------------------------------------------------------------------


def test_labels_beyond_the_classes_are_refused():
    state = linear.init(jax.random.key(0), 3, 5, RATES)
    step = linear.make_step(5)
    for wrong in (5, -1):
        labels = np.array([0, wrong], np.int32)
        message = error_of(step, state, np.ones((2, 3), np.float32), labels)
        assert f"label {wrong}" in message and "0 to 4" in message
        error_of(linear.ranks, state, np.ones((2, 3), np.float32), labels)


def test_features_of_another_width_are_refused():
    state = linear.init(jax.random.key(0), 3, 5, RATES)
    message = error_of(
        linear.make_step(5), state, np.ones((2, 4), np.float32), np.zeros(2, np.int32)
    )
    assert "(2, 4)" in message and "expected [B, 3]" in message


@pytest.mark.parametrize("labels", [[1], [1, 0, 2], [[1], [0]], [1.0, 0.0]])
def test_each_row_of_features_needs_a_label(labels):
    state = linear.init(jax.random.key(0), 3, 5, RATES)
    features = np.ones((2, 3), np.float32)
    for call in (linear.make_step(5), linear.ranks):
        message = error_of(call, state, features, labels)
        assert "for 2 rows of features, expected an integer for each" in message


def test_lists_are_taken_too():
    state = linear.init(jax.random.key(0), 3, 5, RATES)
    x, y = np.ones((2, 3), np.float32), np.array([1, 0], np.int32)
    for call in (linear.make_step(5), linear.ranks):
        found, expected = call(state, x.tolist(), y.tolist()), call(state, x, y)
        jax.tree.map(
            np.testing.assert_array_equal, *map(jax.tree.leaves, (found, expected))
        )


def test_senseless_arguments_are_refused():
    key = jax.random.key(0)
    assert "learning rates" in error_of(linear.init, key, 3, 5, [0.1, -1.0])
    assert "learning rates" in error_of(linear.init, key, 3, 5, [])
    assert "1 classes" in error_of(linear.init, key, 3, 1, [0.1])
    assert "total_steps=0" in error_of(linear.make_step, 0)


@pytest.mark.parametrize("donate", [False, True])
def test_a_state_can_be_used_again_unless_it_is_donated(donate):
    features, labels = data(1)
    state = linear.init(jax.random.key(0), 12, 7, RATES)
    kernel = np.array(state.kernel)
    moved, _ = linear.make_step(5, donate=donate)(state, features[0], labels[0])
    assert not np.array_equal(moved.kernel, kernel)
    assert state.kernel.is_deleted() == donate
    assert donate or np.array_equal(state.kernel, kernel)
