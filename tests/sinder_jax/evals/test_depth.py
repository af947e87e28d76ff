"""The depth head, against a PyTorch transcription and the numbers of its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import depth

OFFICIAL = depth.Options()


# --- Worked numbers -------------------------------------------------------------------


def test_depth_is_the_mean_of_bins():
    for dtype in (np.float32, np.int32, jnp.bfloat16):
        logits = np.array([[0, 2, -1, 1]], dtype)
        got = depth.depth_from_logits(logits, 0.001, 10.0)
        np.testing.assert_allclose(got, [5.490647], rtol=1e-6)


def test_depth_of_zero_logits_is_the_middle():
    got = depth.depth_from_logits(np.zeros((2, 3, 256), np.float32), 0.001, 10.0)
    np.testing.assert_allclose(got, np.full((2, 3), 5.0005), rtol=1e-6)


def test_depth_stays_in_the_range_and_a_factor_changes_it():
    rng = np.random.default_rng(0)
    logits = 1e6 * rng.standard_normal((50, 256)).astype(np.float32)
    logits[0] = np.where(np.arange(256) == 255, 1e9, 0)
    got = np.array(depth.depth_from_logits(logits, 0.001, 10.0))
    assert 0.001 <= got.min() and got.max() <= np.float32(10)
    one = np.array([1, 0, 2], np.float32)
    assert depth.depth_from_logits(one, 1.0, 3.0) != depth.depth_from_logits(
        2 * one, 1.0, 3.0
    )


def test_sig_loss():
    predicted, truth = np.array([1, 2, 4, 3.0]), np.array([1, 2.5, 0, 2.0])
    assert float(depth.sig_loss(predicted, truth)) == pytest.approx(0.319414, abs=1e-6)
    warm_up = depth.sig_loss(predicted, truth, warm_up=True)
    assert float(warm_up) == pytest.approx(0.023529, abs=1e-6)


@pytest.mark.parametrize("truth", [[0.0, 0.0], [1.0, 2.0]], ids=["unknown", "perfect"])
def test_sig_loss_has_a_gradient_where_a_root_has_none(truth):
    loss, gradient = jax.value_and_grad(depth.sig_loss)(
        jnp.array([1.0, 2.0]), jnp.array(truth)
    )
    assert loss == 0 and np.array_equal(gradient, [0, 0])


def test_sig_loss_hides_nothing_that_is_not_finite():
    for predicted, truth in (([1.0, 2.0], [1.0, np.inf]), ([np.nan, 2.0], [1.0, 2.0])):
        assert np.isnan(depth.sig_loss(np.array(predicted), np.array(truth)))
    assert np.isfinite(depth.sig_loss(np.array([np.nan, 2.0]), np.array([0.0, 3.0])))


def test_scores():
    truth, predicted = [1, 2, 4, 0, 12], [1.2, 1.8, 5.2, 3, 9]
    got = depth.scores(np.array(predicted), np.array(truth, float), 0.001, 10.0)
    want = {
        "a1": 0.666667,
        "a2": 1,
        "a3": 1,
        "abs_rel": 0.2,
        "sq_rel": 0.14,
        "rmse": 0.711805,
        "rmse_log": 0.194231,
        "log_10": 0.079627,
        "silog": 15.789917,
    }
    assert list(got) == list(want)
    np.testing.assert_allclose(list(got.values()), list(want.values()), atol=6e-7)


def test_scores_of_nothing_are_no_numbers():
    got = depth.scores(np.ones(3), np.array([0.0, 10.0, 0.001]), 0.001, 10.0)
    assert all(math.isnan(x) for x in got.values())


def test_silog_of_equal_errors_is_zero():
    got = depth.scores(np.full(9, 1.1), np.ones(9), 0.001, 10.0)
    assert got["silog"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1.0e-7),
        (6_400, 4.66973e-5),
        (12_799, 7.49977e-5),
        (12_800, 7.5e-5),
        (19_200, 5.0e-5),
        (38_399, 1.167e-12),  # 1e-4·(1e-8 + 1.67e-9)
    ],
)
def test_learning_rate(step, rate):
    got = float(depth.learning_rate(step, OFFICIAL))
    assert got == pytest.approx(rate, rel=3e-4)  # of the numbers above


def test_learning_rate_has_the_digits_of_float32():
    for step in (0, 1, 2, 100, 12_799, 38_399):
        done = min(step / 12_800, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * step / 38_400))
        rate = 1e-4 * (1e-8 + (1 - 1e-8) * cosine) * (1 - (1 - done) * (1 - 0.001))
        got = float(depth.learning_rate(step, OFFICIAL))
        assert got == pytest.approx(rate, rel=5e-7)
    assert depth.learning_rate(50_000, OFFICIAL) == depth.learning_rate(
        38_400, OFFICIAL
    )


@pytest.mark.parametrize(
    ("step", "beta"),
    [(0, 0.95), (5_760, 0.90), (11_519, 0.85), (20_000, 0.87262), (38_399, 0.95)],
)
def test_beta1(step, beta):
    assert float(depth.beta1(step, OFFICIAL)) == pytest.approx(beta, abs=1e-5)


def test_blocks_are_dinov2s():
    assert [depth.blocks(n, 4) for n in (12, 24, 40)] == [
        (2, 5, 8, 11),
        (4, 11, 17, 23),
        (9, 19, 29, 39),
    ]
    assert [depth.blocks(n, 1) for n in (12, 24, 40)] == [(11,), (23,), (39,)]
    assert depth.blocks(4, 4) == (0, 1, 2, 3)
    assert "layers=2" in error_of(depth.blocks, 12, 2)
    assert "3 blocks" in error_of(depth.blocks, 3, 4)


def test_input_is_patch_then_class_token_block_by_block():
    cls = jnp.array([[[1.0]], [[2.0]]])  # two blocks, one image, one channel
    patches = jnp.arange(10, 18, dtype=jnp.float32).reshape(2, 1, 2, 2, 1)
    got = depth.head_input(cls, patches)
    assert got.shape == (1, 2, 2, 4)
    assert got[0, 0, 1].tolist() == [11, 1, 15, 2]


# --- Training, as in PyTorch ----------------------------------------------------------


def test_training_is_pytorchs():
    torch, heads = (pytest.importorskip(name) for name in ("torch", "torch_heads"))
    options = depth.Options(
        total_steps=24, learning_rate=0.1, loss_warm_up=6, clip=0.05
    )
    rng = np.random.default_rng(0)
    features = 3 * rng.standard_normal((24, 4, 3, 5, 8)).astype(np.float32)
    truth = 1 + 4 * (features[..., 0] > 0).astype(np.float32)
    truth = truth.repeat(10, axis=2).repeat(9, axis=3)  # 30 x 45: not 4 times 3 x 5
    truth[:, :, :7] = 0  # unknown
    state = depth.init(jax.random.key(0), 8)
    head = heads.DepthHead(8, options)
    with torch.no_grad():
        kernel = torch.tensor(np.array(state.kernel).T)
        head.conv.weight.copy_(kernel[:, :, None, None])
        head.conv.bias.copy_(torch.tensor(np.array(state.bias)))
    channels_first = torch.tensor(np.moveaxis(features, -1, 2))
    theirs = heads.train_depth(head, channels_first, torch.tensor(truth), options)
    step, ours = depth.make_step(options), []
    for x, y in zip(features, truth, strict=True):
        state, loss = step(state, x, y)
        ours.append(float(loss))
    assert ours[-1] < 0.95 * ours[6]  # it learned
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    weights = head.conv.weight.detach().numpy()[:, :, 0, 0].T
    # A logit that rounds to the other side of 0 has its gradient in one of them only,
    # and Adam makes small gradients as large as others.
    assert np.quantile(np.abs(state.kernel - weights), 0.98) < 5e-5

    with torch.no_grad():
        found = head(channels_first[0], (7, 11)).clamp(0.001, 10)
    got = depth.predict(state, features[0], (7, 11))
    np.testing.assert_allclose(got, found, atol=1e-3)


def test_only_the_images_of_a_group_share_a_loss():
    """The loss of four images is the mean of the losses of two and two."""
    options = depth.Options(total_steps=9, loss_warm_up=0)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 2, 2, 3)).astype(np.float32)
    y = rng.uniform(1, 9, (4, 28, 28)).astype(np.float32)

    y[2:] *= 3
    step = depth.make_step(options)

    def loss(*images):
        state = depth.init(jax.random.key(0), 3, bins=8)
        return float(step(state, x[list(images)], y[list(images)])[1])

    pairs = np.array([loss(0, 1), loss(2, 3)])
    assert loss(0, 1, 2, 3) == pytest.approx(pairs.mean(), rel=1e-6)
    # Shared by all four it would see how different the two pairs are.
    assert loss(0, 2, 1, 3) > 1.1 * pairs.mean()


def test_initial_weights_are_pytorchs_default():
    state = depth.init(jax.random.key(0), 100)
    assert state.kernel.shape == (100, 256)
    for x in (state.kernel, state.bias):
        assert 0.095 < float(jnp.max(jnp.abs(x))) <= 0.1
    assert float(jnp.std(state.kernel)) == pytest.approx(0.1 / 3**0.5, rel=0.02)


# --- Mistakes -------------------------------------------------------------------------


def test_mistakes_are_named():
    state = depth.init(jax.random.key(0), 3)
    x = np.zeros((3, 2, 2, 3), np.float32)
    message = error_of(depth.make_step(OFFICIAL), state, x, np.zeros((3, 4, 4)))
    assert "3 images" in message and "multiple of the 2" in message
    wide = np.zeros((2, 2, 2, 5), np.float32)
    assert "(2, 2, 2, 5)" in error_of(depth.predict, state, wide, (4, 4))
    one = error_of(depth.make_step(OFFICIAL), state, x[:2], np.zeros((1, 4, 4)))
    assert "got a truth of shape (1, 4, 4), expected [2, height, width]" in one
    assert "max_depth=0.0" in error_of(depth.Options, max_depth=0.0)
