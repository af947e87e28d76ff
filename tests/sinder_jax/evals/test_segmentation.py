import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax import placement
from sinder_jax.data import masks, scene_crops
from sinder_jax.evals import metrics, segmentation
from sinder_jax.evals.segmentation import SegmentationOptions, windows

PUBLISHED = SegmentationOptions()


def trained(channels=6, classes=4, seed=0):
    """A head whose every number counts, as after some training."""
    rng = np.random.default_rng(seed)
    state = segmentation.init(jax.random.key(seed), channels, classes)
    head = [rng.normal(size=x.shape).astype(np.float32) for x in state.head]
    return state._replace(
        head=segmentation.Head(*map(jnp.asarray, head)),
        mean=jnp.asarray(rng.normal(size=channels), jnp.float32),
        variance=jnp.asarray(rng.uniform(0.5, 2, channels), jnp.float32),
    )


def batch_of(seed, batch=4, grid=(5, 6), channels=6, classes=4, size=(20, 23)):
    rng = np.random.default_rng(seed)
    features = 3 * rng.normal(size=(batch, *grid, channels)) + np.arange(channels)
    labels = rng.integers(0, classes, (batch, *size)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.3] = segmentation.IGNORE
    return features.astype(np.float32), labels


# --- The specification's numbers ------------------------------------------------------


@pytest.mark.parametrize(
    "length, crop, stride, want",
    [
        (512, 512, 341, [(0, 512)]),
        (683, 512, 341, [(0, 512), (171, 683)]),
        (768, 512, 341, [(0, 512), (256, 768)]),
        (1024, 512, 341, [(0, 512), (341, 853), (512, 1024)]),
        (1067, 640, 320, [(0, 640), (320, 960), (427, 1067)]),
        (100, 512, 341, [(0, 100)]),
    ],
)
def test_windows_are_those_of_mmsegmentation(length, crop, stride, want):
    assert windows(length, crop, stride) == want


def test_windows_cover_every_pixel():
    for length in range(1, 60):
        for crop, stride in ((16, 16), (16, 11), (16, 1), (7, 3)):
            spans = windows(length, crop, stride)
            covered = {i for start, stop in spans for i in range(start, stop)}
            assert covered == set(range(length))
            assert all(b - a == min(crop, length) for a, b in spans)


def test_a_stride_that_skips_pixels_is_refused():
    assert "at most 16" in error_of(windows, 40, 16, 17)
    assert "stride: got 0" in error_of(windows, 40, 16, 0)


@pytest.mark.parametrize(
    "n, want",
    [(512, (3, 3)), (640, (2, 2)), (683, (1, 2)), (427, (3, 4)), (565, (4, 5))]
    + [(n, (0, 0)) for n in (560, 392, 322)],
)
def test_center_padding(n, want):
    assert segmentation.center_padding(n) == want


def test_padding_is_zero_around_the_image():
    padded = segmentation.pad_images(jnp.ones((1, 27, 15, 3)))
    assert padded.shape == (1, 28, 28, 3)
    assert (padded[0, :27, 6:21] == 1).all() and padded.sum() == 27 * 15 * 3


def test_sizes_of_the_scales_of_an_image():
    ratios = (1.0, 1.32, 1.73, 2.28, 3.0)
    sides = segmentation.short_sides(640, ratios)
    assert sides == [640, 844, 1107, 1459, 1920]
    sizes = [scene_crops.resized_to(512, 683, side)[::-1] for side in sides]
    assert sizes == [(854, 640), (1126, 844), (1477, 1107), (1946, 1459), (2561, 1920)]
    counts = [len(windows(h, 640, 320)) * len(windows(w, 640, 320)) for w, h in sizes]
    assert counts == [2, 6, 12, 24, 40]


@pytest.mark.parametrize(
    "i, want",
    [
        (0, 1.0e-9),
        (1, 6.67649e-7),
        (49, 3.26276e-5),
        (99, 6.58376e-5),
        (749, 4.899838e-4),
        (1499, 9.618833e-4),
        (1500, 9.625e-4),
        (20_000, 5e-4),
        (39_999, 2.5e-8),
    ],
)
def test_learning_rates(i, want):
    # The numbers have six digits; float32 loses another 1e-6 of 1e-9.
    assert segmentation.learning_rate(i, PUBLISHED) == pytest.approx(want, rel=2e-6)


def test_ignored_pixels_stay_in_the_denominator():
    state = segmentation.init(jax.random.key(0), 1, 2)
    # BatchNorm of two values that differ gives -1 and 1.
    head = segmentation.Head(
        scale=jnp.ones(1),
        shift=jnp.zeros(1),
        kernel=jnp.array([[-1.0, 0.5]]),
        bias=jnp.array([1.0, 0.5]),
    )
    features = jnp.array([-1e3, 1e3]).reshape(1, 1, 2, 1)
    logits = segmentation.patch_logits(
        state._replace(head=head, variance=jnp.full(1, 1e6)), features
    )
    np.testing.assert_allclose(logits[0, 0], [[2, 0], [0, 1]], atol=1e-6)
    labels = jnp.array([[[0, 255]]])
    _, loss = segmentation.make_step()(state._replace(head=head), features, labels)
    assert loss == pytest.approx(0.126928 / 2, abs=1e-6)


@pytest.mark.parametrize("channels, classes, params", [(384, 150, 57_750 + 768)])
def test_head_shapes(channels, classes, params):
    state = segmentation.init(jax.random.key(0), channels, classes)
    assert sum(x.size for x in state.head) == params
    assert state.head.kernel.shape == (channels, classes)
    assert float(jnp.std(state.head.kernel)) == pytest.approx(0.01, rel=0.02)
    assert segmentation.init(jax.random.key(0), 1536, 21).head.kernel.size == 1536 * 21


# --- PyTorch --------------------------------------------------------------------------


def test_training_equals_a_pytorch_loop():
    """40 steps of AdamW, weight decay strong enough to show."""
    torch, heads = (pytest.importorskip(name) for name in ("torch", "torch_heads"))
    options = SegmentationOptions(
        total_steps=40, warmup_steps=5, lr=0.02, weight_decay=0.5
    )
    state = trained()
    head = heads.SegmentationHead(state)
    adam = torch.optim.AdamW(head.parameters(), lr=1.0, weight_decay=0.5)
    step = segmentation.make_step(options)
    for i in range(options.total_steps):
        features, labels = batch_of(i)
        adam.param_groups[0]["lr"] = float(segmentation.learning_rate(i, options))
        scores = head(features, labels.shape[1:])
        want = torch.nn.functional.cross_entropy(
            scores, torch.tensor(labels).long(), ignore_index=255, reduction="sum"
        )
        want = want / labels.size
        adam.zero_grad()
        want.backward()
        adam.step()
        state, loss = step(state, features, labels)
        # Adam turns the rounding of a gradient near 0 into a full step.
        assert float(loss) == pytest.approx(want.item(), rel=2e-5), i
    for ours, theirs in (
        (state.head.kernel.T, head.conv.weight[..., 0, 0]),
        (state.head.bias, head.conv.bias),
        (state.head.scale, head.bn.weight),
        (state.head.shift, head.bn.bias),
        (state.mean, head.bn.running_mean),
        (state.variance, head.bn.running_var),
    ):
        np.testing.assert_allclose(ours, theirs.detach(), atol=1e-4)
    head.eval()
    features, _ = batch_of(99)
    want = head(features, (31, 17)).permute(0, 2, 3, 1).detach()
    got = segmentation.predict(state, features, (31, 17))
    np.testing.assert_allclose(got, want, atol=1e-3)


def patch_means(image, patch):
    """Features that stand in for those of a backbone."""
    padded = np.asarray(segmentation.pad_images(image[None], patch))[0]
    height, width, channels = padded.shape
    cells = padded.reshape(height // patch, patch, width // patch, patch, channels)
    return cells.mean((1, 3))


def window_logits(state, image, crop, stride, patch):
    """Patch logits of all windows [down, across, h, w, classes]."""
    return jnp.stack(
        [
            jnp.stack(
                [
                    segmentation.patch_logits(
                        state,
                        patch_means(image[y[0] : y[1], x[0] : x[1]], patch)[None],
                    )[0]
                    for x in windows(image.shape[1], crop, stride)
                ]
            )
            for y in windows(image.shape[0], crop, stride)
        ]
    )


@pytest.mark.parametrize("size", [(41, 57), (90, 130), (20, 23)])
def test_merged_windows_equal_mmsegmentations_loop(size):
    """The same numbers from one matrix per axis as from whole arrays of logits."""
    state, crop, stride, patch = trained(3), 26, 15, 4
    heads = pytest.importorskip("torch_heads")
    head = heads.SegmentationHead(state).eval()
    image = np.random.default_rng(5).normal(size=(41, 57, 3)).astype(np.float32)
    features_of = functools.partial(patch_means, patch=patch)
    want = heads.sliding(head, image, features_of, crop, stride, size)
    rows, columns = (
        jnp.asarray(
            segmentation.merge_weights(
                length, new, crop=crop, stride=stride, patch=patch
            ),
            jnp.float32,
        )
        for length, new in zip(image.shape[:2], size, strict=True)
    )
    logits = window_logits(state, image, crop, stride, patch)
    got = segmentation.probabilities(logits, rows, columns)
    np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("length", [20, 26, 27, 40, 41, 90])
def test_constant_logits_stay_constant(length):
    """Through the windows' resize, their mean, and the resize to the labels."""
    for size in (7, length, 100):
        weights = segmentation.merge_weights(length, size, crop=26, stride=15, patch=4)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
        assert (weights >= 0).all()


# --- Devices, mistakes ----------------------------------------------------------------


def test_two_devices_give_the_bits_of_one():
    state, (features, labels) = trained(), batch_of(0)
    results = []
    for count in (1, 2):
        sharding = placement.over(jax.devices()[:count])
        step, current = segmentation.make_step(PUBLISHED, sharding), state
        for _ in range(3):
            current, loss = step(current, features, labels)
        results.append(jax.tree.leaves((current, loss)))
    plain, current = segmentation.make_step(), state
    for _ in range(3):
        current, loss = plain(current, features, labels)
    results.append(jax.tree.leaves((current, loss)))
    for one, two, three in zip(*results, strict=True):
        assert np.array_equal(one, two) and np.array_equal(one, three)


@pytest.mark.parametrize("label", [4, -1, 254])
def test_a_label_beyond_the_classes_makes_the_loss_nan(label):
    features, labels = batch_of(0)
    labels[0, 0, 0] = label
    _, loss = segmentation.make_step()(trained(), features, labels)
    assert np.isnan(loss)


def test_a_batch_of_ignored_pixels_has_no_loss():
    features, labels = batch_of(0)
    state, loss = segmentation.make_step()(
        trained(), features, np.full_like(labels, segmentation.IGNORE)
    )
    assert loss == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_features_and_labels_of_different_images_are_refused():
    features, labels = batch_of(0)
    said = error_of(segmentation.make_step(), trained(), features, labels[1:])
    assert "got features (4, 5, 6, 6) and labels (3, 20, 23)" in said


@pytest.mark.parametrize("channels", [1, 5])
def test_features_of_other_channels_are_refused(channels):
    """One channel would be spread over all of the head's."""
    features, labels = batch_of(0, channels=channels)
    for sharding in (None, placement.over(jax.devices()[:1])):
        step = segmentation.make_step(sharding=sharding)
        said = error_of(step, trained(), features, labels)
        assert f"(4, 5, 6, {channels})" in said and "the 6 channels" in said
    said = error_of(segmentation.predict, trained(), features, (20, 23))
    assert "the 6 channels" in said


def test_a_step_takes_lists():
    features, labels = batch_of(0)
    step, state = segmentation.make_step(PUBLISHED), trained()
    _, want = step(state, features, labels)
    assert step(state, features.tolist(), labels.tolist())[1] == want
    assert "expected integers" in error_of(step, state, features, labels * 1.0)


def test_the_warm_up_of_a_short_training_is_no_longer_than_it():
    for total, steps in ((40_000, 1_500), (1_500, 1_500), (100, 100)):
        assert SegmentationOptions(total_steps=total).warmup_steps == steps


def test_options_out_of_range_are_refused():
    assert "total_steps" in error_of(SegmentationOptions, total_steps=0)
    assert "from 0 to total_steps, 9" in error_of(
        SegmentationOptions, total_steps=9, warmup_steps=10
    )
    assert "classes" in error_of(segmentation.init, jax.random.key(0), 3, 1)


# --- Scores ---------------------------------------------------------------------------


def test_the_specifications_scores():
    predictions = np.array([[0, 0, 1], [2, 2, 1]])
    labels = masks.counted_from(np.array([[1, 2, 2], [3, 0, 1]], np.uint8), 1)
    assert labels.tolist() == [[0, 1, 1], [2, 255, 0]]
    scores = metrics.segmentation_scores(
        metrics.confusion_matrix(labels, predictions, 4)
    )
    np.testing.assert_allclose(scores.iou, [1 / 3, 1 / 3, 1, np.nan])
    assert scores.miou == pytest.approx(5 / 9)
    assert scores.macc == pytest.approx(2 / 3)
    assert scores.aacc == pytest.approx(0.6)


def test_scores_equal_scikit_learn():
    """Of masks with ignored pixels; class 5 in no label, 6 in nothing at all."""
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    matrix, seen = np.zeros((7, 7), np.int64), []
    for _ in range(5):
        labels, predictions = rng.integers(0, 5, (40, 50)), rng.integers(0, 6, (40, 50))
        labels[rng.random(labels.shape) < 0.2] = 255
        matrix += metrics.confusion_matrix(labels, predictions, 7)
        seen.append((labels, predictions))
    labels, predictions = (
        np.concatenate([x.ravel() for x in xs]) for xs in zip(*seen, strict=True)
    )
    valid = labels != 255
    labels, predictions = labels[valid], predictions[valid]
    want = sklearn.confusion_matrix(labels, predictions, labels=range(7))
    assert np.array_equal(matrix, want)
    iou = sklearn.jaccard_score(labels, predictions, labels=range(6), average=None)
    scores = metrics.segmentation_scores(matrix)
    np.testing.assert_allclose(scores.iou[:6], iou, rtol=1e-12)
    assert np.isnan(scores.iou[6])
    assert scores.miou == pytest.approx(iou.mean(), rel=1e-12)
    recall = sklearn.recall_score(labels, predictions, labels=range(5), average="macro")
    assert scores.macc == pytest.approx(recall, rel=1e-12)
    accuracy = sklearn.accuracy_score(labels, predictions)
    assert scores.aacc == pytest.approx(accuracy, rel=1e-12)
