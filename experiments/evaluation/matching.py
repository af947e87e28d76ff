"""Clusters matched with classes, once for all images: mIoU, accuracy, pictures.

counts of all images --Hungarian--> mIoU, accuracy, IoU of each class --> Result
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.evaluation.job import Job, Result, Scores
from experiments.evaluation.segmenter import Counts
from experiments.evaluation.unsupervised import Data
from sinder_jax.data import crops
from sinder_jax.evals import metrics
from sinder_jax.plots import scene_plots

LINEAR = "linear"  # counts whose name begins so are of classes, others of clusters
HEADLINE = ("cluster_miou", "cluster_acc", "linear_miou", "linear_acc")
BASELINES = ("kmeans_tokens", "kmeans_colors")
BESIDE = ("kmeans_tokens_miou", "kmeans_colors_miou", "over_kmeans_miou")


def result(
    job: Job,
    of_seeds: Sequence[Counts],
    evaluated: Mapping[str, Any],
    shown: Sequence[np.ndarray] = (),
) -> Result:
    """What a model got, with Hungarian matching and the metrics of the originals.

    Args:
      job: of the evaluation.
      of_seeds: of each seed, counts by name, [n, C, K]; among them `cluster` and
        `linear`.
      evaluated: what the method has to tell, beside what all tell.
      shown: predictions of the first validation images by the first seed, see
        `predictions`.
    """
    config, data = job.config, job.data
    names = tuple(of_seeds[0])
    stacked = np.stack(
        [np.stack([each[name] for name in names], axis=1) for each in of_seeds]
    )
    count_scores = functools.partial(score, names)
    by_seed = [count_scores(each.sum(0), len(each)) for each in stacked]
    total = stacked[:, :, names.index("cluster")].sum(1)
    figures = {}
    if shown:
        figures["scenes"] = _pictures(job, shown, total[0])
    crf_told = "10 iterations" if config.crf else "none"
    told = {
        "data": data.found.title + ", incomplete" * bool(data.found.lacks),
        "training images": f"{len(data.train)} of {config.train_size} px",
        "images": len(data.found.val),
        "masks": f"{config.test_size} x {config.test_size} pixels, nearest neighbor",
        "classes": data.num_classes,
        "CRF": crf_told,
        **evaluated,
    }
    if config.seeds > 1:
        spread = [each["cluster_miou"] for each in by_seed]
        told["cluster_miou of seeds"] = ", ".join(f"{x:.1f}" for x in spread)
    return Result(
        counts=stacked.astype(np.float64),
        score=count_scores,
        headline=HEADLINE + BESIDE * (BASELINES[0] in names),
        unit="%",
        evaluated=told,
        details={"iou": _iou_of_classes(data, total), "by_seed": by_seed},
        figures=figures,
    )


def score(names: Sequence[str], total: np.ndarray, num_images: int) -> Scores:
    """Percent, from counts summed over images, [names, C, K].

    mIoU is the mean over classes that are in the labels or the predictions, accuracy
    the share of right pixels. `map` is the mean over clusters of the share of their
    pixels that is right, CAUSE's "mAP". `over_kmeans` is what the clusters have more
    than the better of `BASELINES`, if these are there: all of them without a CRF, and
    all that see tokens with those of mirrored images.
    """
    del num_images  # pixels count, not images
    found: Scores = {}
    for name, matrix in zip(names, total, strict=True):
        right = matrix if name.startswith(LINEAR) else matched(matrix)
        scores = metrics.segmentation_scores(right)
        found[f"{name}_miou"] = 100 * scores.miou
        found[f"{name}_acc"] = 100 * scores.aacc
        if not name.startswith(LINEAR):
            found[f"{name}_map"] = 100 * _precision(right)
    if BASELINES[0] in names:
        own = "cluster_raw" if "cluster_raw" in names else "cluster"
        for kind in ("miou", "acc"):
            least = max(found[f"{name}_{kind}"] for name in BASELINES)
            found[f"over_kmeans_{kind}"] = found[f"{own}_{kind}"] - least
    return found


def matched(matrix: np.ndarray) -> np.ndarray:
    """The same counts with the columns in the order of the classes, [C, C]."""
    found = metrics.match_clusters(matrix)
    return matrix[:, np.argsort(found)]


def _precision(matrix: np.ndarray) -> float:
    predicted = matrix.sum(0)
    kept = predicted > 0
    return float((matrix.diagonal()[kept] / predicted[kept]).mean())


def _iou_of_classes(data: Data, totals: np.ndarray) -> dict[str, float | None]:
    """Percent by class, the mean over the seeds that count it; None if no seed does.

    Args:
      data: names the classes.
      totals: counts of clusters, summed over images, [seeds, C, K].
    """
    iou = np.array(
        [100 * metrics.segmentation_scores(matched(each)).iou for each in totals]
    )
    counting = np.isfinite(iou).sum(0)
    mean = np.where(counting, np.nansum(iou, 0) / np.maximum(counting, 1), np.nan)
    names = data.found.classes or map(str, range(data.num_classes))
    return {
        name: float(x) if np.isfinite(x) else None
        for name, x in zip(names, mean, strict=True)
    }


def _pictures(job: Job, shown: Sequence[np.ndarray], total: np.ndarray) -> Figure:
    """Photograph, clusters in the colors of their classes, and truth."""
    config, found = job.config, job.data.found
    classes = metrics.match_clusters(total).astype(np.uint8)
    drawn = []
    for scene, each in zip(found.val, shown, strict=False):
        pixels, mask = (
            crops.square(x, config.test_size, squash=config.squash)
            for x in scene.read()
        )
        drawn.append((pixels, classes[each[0, 0]], mask))
    return scene_plots.scenes(drawn, found.classes, found.palette)
