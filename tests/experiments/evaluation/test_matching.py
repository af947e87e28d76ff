"""Clusters matched with classes, on counts worked out by hand."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.evaluation import matching


def test_scores_are_the_originals():
    # Worked by hand: predictions 2,2,2,0,0,1,1,1,0,2 of labels 0,0,0,1,1,1,-1,2,2,0.
    clusters = np.array([[0, 0, 4], [2, 1, 0], [1, 1, 0]])
    found = matching.score(("cluster",), clusters[None], 1)
    assert found["cluster_miou"] == pytest.approx(61.111, abs=1e-3)
    assert found["cluster_acc"] == pytest.approx(77.778, abs=1e-3)
    assert found["cluster_map"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)


def test_clusters_are_matched_and_probes_are_not():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (4, 4)) + 99 * np.eye(4, dtype=int)[[1, 2, 3, 0]]
    found = matching.score(("cluster", "linear"), np.stack([counts, counts]), 1)
    best = max(
        sum(counts[label, cluster] for label, cluster in enumerate(order))
        for order in itertools.permutations(range(4))
    )
    assert found["cluster_acc"] == pytest.approx(100 * best / counts.sum())
    assert found["linear_acc"] == pytest.approx(100 * np.trace(counts) / counts.sum())
    moved = np.stack([counts[:, [2, 0, 3, 1]]] * 2)
    again = matching.score(("cluster", "linear"), moved, 1)
    assert again["cluster_miou"] == found["cluster_miou"]
    assert again["linear_miou"] != found["linear_miou"]


def test_the_better_baseline_is_what_a_method_must_exceed():
    right, half, wrong = np.eye(2) * 8, np.array([[6, 2], [4, 4]]), np.full((2, 2), 4)
    names = ("cluster", "linear", "cluster_raw", "kmeans_tokens", "kmeans_colors")
    found = matching.score(names, np.stack([right, wrong, half, half, wrong]), 1)
    assert found["cluster_acc"] == 100
    assert found["over_kmeans_acc"] == 0  # neither has a CRF
    found = matching.score(names, np.stack([right, wrong, half, wrong, half]), 1)
    assert found["over_kmeans_acc"] == 0  # of colors
    without = ("cluster", "linear", "kmeans_tokens", "kmeans_colors")
    found = matching.score(without, np.stack([right, wrong, half, wrong]), 1)
    assert found["over_kmeans_acc"] == pytest.approx(37.5)
    assert found["over_kmeans_miou"] == pytest.approx(
        found["cluster_miou"] - found["kmeans_tokens_miou"]
    )


def test_a_class_that_only_one_seed_predicts_has_the_mean_over_it():
    # Class 1 is in no mask; only the first seed predicts it, for a pixel.
    totals = np.array(
        [[[3, 1, 0], [0, 0, 0], [0, 0, 4]], [[4, 0, 0], [0] * 3, [0] * 3]]
    )
    found = SimpleNamespace(found=SimpleNamespace(classes=("a", "b", "c")))
    iou = matching._iou_of_classes(found, totals)
    assert iou == {"a": 87.5, "b": 0.0, "c": 100.0}
    assert matching._iou_of_classes(found, totals[1:])["b"] is None
