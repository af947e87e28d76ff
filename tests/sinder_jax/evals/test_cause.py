import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.evals import cause, cause_head, modularity, probes
from sinder_jax.evals.cause_optimizer import Options, moments_of, update

B, SIDE, D, K, CLASSES, REDUCED = 2, 8, 6, 7, 3, 5
OPTIONS = Options(lr=0.01, weight_decay=10.0, clip=1e-3)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(B, SIDE, SIDE, D)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (B, 20, 20)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    return jnp.asarray(features), jnp.asarray(labels)


@pytest.fixture(scope="module")
def codebook():
    return jax.random.normal(jax.random.key(5), (K, D))


def start(label_leak=False):
    of_head, of_linear, of_clusters = jax.random.split(jax.random.key(0), 3)
    return cause.init_fine_tuning(
        of_clusters,
        cause_head.init(of_head, SIDE * SIDE, D, REDUCED),
        probes.init_linear(of_linear, REDUCED, CLASSES),
        label_leak=label_leak,
    )


def test_the_contract_has_the_modularity_loss():
    assert cause.modularity_loss is modularity.modularity_loss


# --- 1: codebook ----------------------------------------------------------------------


def test_a_codebook_splits_the_graph_of_tokens():
    """Tokens around three directions; a step sees 16 of 256 of each image."""
    rng = np.random.default_rng(0)
    of_tokens = rng.integers(0, 3, (2, 16, 16))
    features = np.eye(D)[of_tokens] + 0.1 * rng.normal(size=(2, 16, 16, D))
    features = jnp.asarray(features, jnp.float32)
    state = cause.init_codebook(jax.random.key(0), K, D)
    step, steps = cause.make_codebook_step(Options(lr=0.01)), 40

    def whole():
        flat = features.reshape(2, -1, D)
        return float(cause.modularity_loss(flat, state.codebook))

    before = whole()
    for k in range(steps):
        state, loss = step(state, features, jax.random.key(k))
    assert whole() < before - 0.2 and loss.shape == () and state.moments.steps == steps
    _, codes = modularity.quantize(features, state.codebook)
    groups = [set(np.asarray(codes)[of_tokens == c].tolist()) for c in range(3)]
    assert len(set.union(*groups)) > 1 and all(len(each) == 1 for each in groups)


# --- 3: fine-tuning -------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(batch, codebook):
    """By all parameters, without the leak and with it."""

    def loss(params, label_leak):
        losses = cause.fine_tuning_losses(
            params, codebook, *batch, jax.random.key(3), label_leak=label_leak
        )
        return jnp.sum(losses)

    @jax.jit
    def both(params):
        return [jax.grad(loss)(params, leak) for leak in (False, True)]

    return both(start().params)


def test_with_the_leak_labels_reach_all_of_the_head(gradients):
    found = gradients[True]
    leaves = jax.tree.leaves(found.head)
    assert len(leaves) == 25 and all((leaf != 0).any() for leaf in leaves)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(found[1:]))


def test_without_the_leak_only_linear_probe_and_clusters_learn(gradients):
    found = gradients[False]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found.head))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(found[1:]))
    for ours, leaky in zip(found[1:], gradients[True][1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, leaky)


@pytest.mark.parametrize("label_leak", [False, True])
def test_a_step_moves_what_the_labels_may_reach(batch, codebook, gradients, label_leak):
    """Without the leak not even weight decay moves the head, as of no gradient.

    The clusters have an optimizer of their own, without decay and clipping.
    """
    before, state = start(label_leak).params, start(label_leak)
    step = cause.make_fine_tuning_step(codebook, OPTIONS, label_leak=label_leak)
    state, losses = step(state, *batch, jax.random.key(3))
    assert losses.shape == (2,) and np.isfinite(losses).all()
    slopes = gradients[label_leak]
    groups = {False: ("linear",), True: ("head", "linear")}[label_leak]
    old, new, slope = (
        [getattr(params, name) for name in groups]
        for params in (before, state.params, slopes)
    )
    want, _ = update(old, slope, moments_of(old), OPTIONS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), new, want)
    jax.tree.map(lambda a, b: (a != b).any() or 1 / 0, old, new)
    if not label_leak:
        jax.tree.map(np.testing.assert_array_equal, state.params.head, before.head)
    moments = moments_of(before.clusters)
    plain, decayed = (
        update(before.clusters, slopes.clusters, moments, options)[0]
        for options in (Options(lr=OPTIONS.lr), OPTIONS)
    )
    np.testing.assert_allclose(state.params.clusters, plain, atol=1e-6)
    assert np.abs(decayed - plain).max() > 1e-3


# --- Test -----------------------------------------------------------------------------


def test_log_probabilities_of_clusters():
    clusters = jnp.array([(1.0, 0, 0), (0, 3, 4)])
    tokens = jnp.array([(1, 1, 0), (0, 1, 1), (2, 0, 0.1), (1, 2, 2.0)])
    found = probes.cluster_log_probabilities(tokens, clusters, cause.ALPHA)
    want = [
        [-0.35631, -3.01989, -0.05481, -1.95298],
        [-1.20483, -0.05004, -2.93121, -0.15298],
    ]
    np.testing.assert_allclose(found.T, want, atol=5e-6)


def test_codes_are_those_of_the_head_without_dropout(batch, codebook):
    head = start().params.head
    found = cause.codes(head, codebook, batch[0])
    quantized, _ = modularity.quantize(batch[0], codebook)
    want = cause_head.apply(head, batch[0], quantized)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert found.shape == (B, SIDE, SIDE, REDUCED)
