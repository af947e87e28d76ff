import itertools

import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import metrics

# Spec segmentation.md, section 10: an ADE20k label, whose 0 is ignored.
PREDICTED = np.array([[0, 0, 1], [2, 2, 1]])
LABELED = np.array([[0, 1, 1], [2, 255, 0]])


def noise(classes=6, shape=(40, 50), seed=0):
    """Labels with ignored pixels, and predictions; the last class is in neither."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 1, shape).astype(np.uint8)
    labels[rng.random(shape) < 0.1] = 255
    return labels, rng.integers(0, classes - 1, shape)


def test_the_spec_s_example_gives_its_scores():
    matrix = metrics.confusion_matrix(LABELED, PREDICTED, 4)
    assert matrix.dtype == np.int64 and matrix.sum() == 5
    found = metrics.segmentation_scores(matrix)
    np.testing.assert_allclose(found.iou, [1 / 3, 1 / 3, 1, np.nan])
    expected = (5 / 9, 2 / 3, 3 / 5)
    assert (found.miou, found.macc, found.aacc) == pytest.approx(expected, rel=1e-15)


def test_counts_are_scikit_learn_s():
    oracle = pytest.importorskip("sklearn.metrics")
    labels, predictions = noise()
    valid = labels != 255
    expected = oracle.confusion_matrix(
        labels[valid], predictions[valid], labels=range(6)
    )
    found = metrics.confusion_matrix(labels, predictions, 6)
    np.testing.assert_array_equal(found, expected)
    scores = metrics.segmentation_scores(found)
    iou = oracle.jaccard_score(labels[valid], predictions[valid], average=None)
    assert abs(scores.miou - iou.mean()) < 1e-12  # which leaves the absent class out
    accuracy = oracle.balanced_accuracy_score(labels[valid], predictions[valid])
    assert abs(scores.macc - accuracy) < 1e-12


def test_matrices_of_images_add_up():
    labels, predictions = noise()
    whole = metrics.confusion_matrix(labels, predictions, 6)
    parts = [
        metrics.confusion_matrix(*pair, 6)
        for pair in zip(labels, predictions, strict=True)
    ]
    np.testing.assert_array_equal(sum(parts), whole)


def test_a_class_that_is_only_predicted_counts_as_0():
    found = metrics.segmentation_scores([[3, 1], [0, 0]])
    np.testing.assert_allclose(found.iou, [0.75, 0])
    assert (found.miou, found.macc) == (0.375, 0.75)  # no pixel is labeled 1


def test_no_labeled_pixel_gives_nan():
    found = metrics.segmentation_scores(np.zeros((3, 3), int))
    assert np.isnan([found.miou, found.macc, found.aacc, *found.iou]).all()


def test_minus_1_can_be_what_is_ignored():
    matrix = metrics.confusion_matrix([-1, 0, 1], [9, 0, 0], 2, ignore=-1)
    np.testing.assert_array_equal(matrix, [[1, 0], [1, 0]])


@pytest.mark.parametrize(
    "labels, predictions, message",
    [
        ([0, 3], [0, 0], "got the label 3, expected 0 to 2 or 255 (ignored)"),
        ([0, -1], [0, 0], "got the label -1, expected 0 to 2 or 255 (ignored)"),
        ([0, 1], [0, 3], "got the prediction 3, expected 0 to 2"),
        ([0, 1], [0], "got labels (2,) and predictions (1,), expected the same shape"),
        ([0.0, 1], [0, 1], "got labels of float64, expected integers"),
    ],
)
def test_what_is_no_class_raises(labels, predictions, message):
    found = error_of(metrics.confusion_matrix, labels, predictions, 3)
    assert message in found


@pytest.mark.parametrize(
    "predictions, labels, matched, iou, miou, acc",
    [
        (
            [2, 2, 2, 0, 0, 1, 1, 1, 0, 2],
            [0, 0, 0, 1, 1, 1, -1, 2, 2, 0],
            [1, 2, 0],
            [1, 0.5, 1 / 3],
            61.111,
            77.778,
        ),
        (
            [3, 3, 1, 1, 0, 0, 1],
            [0, 0, 1, 1, 2, 2, 2],
            [2, 1, 3, 0],
            [1, 2 / 3, 2 / 3, np.nan],
            77.778,
            85.714,
        ),
    ],
)
def test_clusters_of_stego_s_specification(
    predictions, labels, matched, iou, miou, acc
):
    counts = metrics.confusion_matrix(labels, predictions, len(iou), ignore=-1)
    assert metrics.match_clusters(counts).tolist() == matched
    found = metrics.segmentation_scores(counts[:, np.argsort(matched)])
    np.testing.assert_allclose(found.iou, iou)
    assert (100 * found.miou, 100 * found.aacc) == pytest.approx((miou, acc), abs=1e-3)


@pytest.mark.parametrize("count", range(1, 7))
def test_clusters_are_matched_as_by_trying_all(count):
    rng = np.random.default_rng(count)
    matrix = rng.integers(0, 100, (count, count))
    best = max(
        (matrix[:, list(p)] for p in itertools.permutations(range(count))), key=np.trace
    )
    matched = metrics.match_clusters(matrix)
    assert sorted(matched) == list(range(count))
    found = metrics.segmentation_scores(matrix[:, np.argsort(matched)])
    want = metrics.segmentation_scores(best)
    assert (found.aacc, found.miou) == (want.aacc, want.miou)
    shuffled = metrics.match_clusters(matrix[:, ::-1])
    assert shuffled[::-1].tolist() == matched.tolist()


@pytest.mark.parametrize("classes, clusters", [(6, 6), (4, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_of_equal_matchings_any_is_the_best(classes, clusters, seed):
    matrix = np.random.default_rng(seed).integers(0, 3, (classes, clusters))
    tried = itertools.permutations(range(clusters), classes)
    best = max(matrix[range(classes), chosen].sum() for chosen in tried)
    matched = metrics.match_clusters(matrix)
    used = np.flatnonzero(matched >= 0)
    assert sorted(matched[used]) == list(range(classes))
    assert matrix[matched[used], used].sum() == best


def test_clusters_left_over_have_no_class():
    matched = metrics.match_clusters([[0, 9, 1], [5, 8, 0]])
    assert matched.tolist() == [1, 0, -1]
    assert metrics.match_clusters([[0, 1], [9, 0], [8, 0]]).tolist() == [1, 0]
