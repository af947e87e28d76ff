"""Scores of labels and predictions, from one exact matrix of counts.

    labels, predictions --confusion_matrix--> counts [C, C], which add up over images
    counts --segmentation_scores--> mIoU, mAcc, aAcc, IoU of each class
    counts of clusters --match_clusters--> the class that each cluster stands for

All of it is NumPy in int64 and float64: JAX counts in int32 unless x64 is enabled, and
the pixels of ADE20k's validation set alone are more than 2**31.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment


class SegmentationScores(NamedTuple):
    """Scores as fractions, 0 to 1; NaN where there is nothing to divide by.

    Attributes:
      miou: mean of `iou` over the classes that are not NaN.
      macc: mean over the labeled classes of the share of their pixels that were found.
      aacc: share of all pixels that are right.
      iou: intersection over union of each class, [C]; NaN for a class in neither labels
        nor predictions.
    """

    miou: float
    macc: float
    aacc: float
    iou: Float64[np.ndarray, " C"]


def confusion_matrix(
    labels: ArrayLike, predictions: ArrayLike, num_classes: int, ignore: int = 255
) -> Int64[np.ndarray, "C C"]:
    """Counts each pair of label and prediction; the matrices of images add up.

    Args:
      labels: integers of any shape, 0 to `num_classes` - 1, or `ignore`.
      predictions: integers of the same shape, 0 to `num_classes` - 1; anything where
        the label is `ignore`.
      num_classes: C.
      ignore: the label of what does not count; 255, or -1 in some data sets.

    Returns:
      Counts; rows are labels, columns predictions.

    Raises:
      ValueError: shapes that differ, numbers that are not integers, or a label or
        prediction beyond the classes.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape:
        raise ValueError(
            f"got labels {labels.shape} and predictions {predictions.shape}, expected "
            "the same shape"
        )
    if num_classes < 1:
        raise ValueError(f"got num_classes={num_classes}, expected at least 1")
    for name, array in (("labels", labels), ("predictions", predictions)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"got {name} of {array.dtype}, expected integers")
    counts = labels != ignore
    rows, columns = (x[counts].astype(np.int64) for x in (labels, predictions))
    for name, found in (("label", rows), ("prediction", columns)):
        if found.size and not 0 <= found.min() <= found.max() < num_classes:
            wrong = found.min() if found.min() < 0 else found.max()
            also = f" or {ignore} (ignored)" if name == "label" else ""
            raise ValueError(
                f"got the {name} {wrong}, expected 0 to {num_classes - 1}{also}"
            )
    pairs = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return pairs.astype(np.int64).reshape(num_classes, num_classes)


def segmentation_scores(matrix: ArrayLike) -> SegmentationScores:
    """Scores of a confusion matrix, as mmsegmentation's `total_area_to_metrics`.

    IoU = hits / (labeled + predicted - hits), class by class; a class that is in
    neither labels nor predictions is left out of the mean, a class that is predicted
    but never labeled counts as 0. Torchmetrics counts some absent classes as 0 or 1.

    Args:
      matrix: counts [C, C], rows labels, columns predictions; of all images together,
        for the mean of the images' scores is another number.

    Raises:
      ValueError: not a square matrix.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"got a matrix {counts.shape}, expected [classes, classes]")
    return scores_of_areas(counts.diagonal(), counts.sum(1), counts.sum(0))


def scores_of_areas(
    hits: ArrayLike, labeled: ArrayLike, predicted: ArrayLike
) -> SegmentationScores:
    """The same scores from what they depend on, three counts for each class.

    Args:
      hits: pixels whose label and prediction are the class, [C].
      labeled: pixels whose label is the class, [C].
      predicted: pixels whose prediction is the class and whose label counts, [C].
    """
    hit, label, prediction = (
        np.asarray(x, np.float64) for x in (hits, labeled, predicted)
    )
    iou = _ratio(hit, label + prediction - hit)
    aacc = _ratio(hit.sum(keepdims=True), label.sum(keepdims=True))[0]
    return SegmentationScores(_mean(iou), _mean(_ratio(hit, label)), float(aacc), iou)


def match_clusters(matrix: ArrayLike) -> Int64[np.ndarray, " K"]:
    """The class of each cluster, so that most pixels are right (Hungarian method).

    Source: mhamilton723/STEGO utils.py `UnsupervisedMetrics`, which does so once for
    the whole data set.

    Args:
      matrix: counts [C, K], rows labels, columns clusters.

    Returns:
      A class for each cluster, no class twice; -1 for the clusters left over if there
      are more clusters than classes.

    Raises:
      ValueError: not a matrix.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2:
        raise ValueError(f"got counts {counts.shape}, expected [classes, clusters]")
    classes, clusters = linear_sum_assignment(counts, maximize=True)
    matched = np.full(counts.shape[1], -1, np.int64)
    matched[clusters] = classes
    return matched


def _ratio(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    """The mean without NaN; NaN if there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
