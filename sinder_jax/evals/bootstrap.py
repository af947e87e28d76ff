"""How sure a metric is: bootstrap intervals over images, and over seeds of a head.

    counts [seeds, images, ...] --draw images, draw seeds, add up, score--> samples
    samples of two models, same draws --subtract--> samples of the difference

Models are compared on the same draws: an image that is hard for both does not widen the
interval of their difference.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Float64

Scores = dict[str, float]
LEVEL = 0.95  # of an interval
AT_ONCE = 2**24  # numbers of the weights that are in memory at a time


def samples(
    counts: Float[np.ndarray, "seeds images ..."],
    score: Callable[[np.ndarray, int], Scores],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Float64[np.ndarray, " resamples"]]:
    """Metrics of resampled images and seeds (Efron's bootstrap).

    Args:
      counts: what each image adds to the sums that the metrics are made of.
      score: the metrics of one seed, from the sum over images [...] and their number.
      resamples: how often images, and seeds, are drawn with replacement.
      seed: of the draws. The same seed, number of images and number of seeds give the
        same draws, whatever the counts.

    Returns:
      By metric, its mean over the seeds drawn, for each resample.

    Raises:
      ValueError: no image, or `resamples` below 1.
    """
    seeds, images = counts.shape[:2]
    if not seeds or not images or resamples < 1:
        raise ValueError(
            f"got {seeds} seeds, {images} images and {resamples} resamples, expected "
            "at least 1 of each"
        )
    flat = counts.reshape(seeds, images, -1).astype(np.float64)
    found: dict[str, list[float]] = {}
    for weights, chosen in _draws(seeds, images, resamples, seed):
        totals = np.stack([weights @ each for each in flat], axis=1)
        totals = totals.reshape(len(weights), seeds, *counts.shape[2:])
        for total, indices in zip(totals, chosen, strict=True):
            scores = [score(total[i], images) for i in indices]
            for name in scores[0]:
                mean = float(np.mean([each[name] for each in scores]))
                found.setdefault(name, []).append(mean)
    return {name: np.array(values) for name, values in found.items()}


def _draws(
    seeds: int, images: int, resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each image is drawn, [R, images], and which seeds, [R, seeds]."""
    rng = np.random.default_rng(seed)
    step = max(1, AT_ONCE // images)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = rng.integers(images, size=(count, images))
        weights = np.stack([np.bincount(row, minlength=images) for row in drawn])
        yield weights.astype(np.float64), rng.integers(seeds, size=(count, seeds))


def interval(values: Float64[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The middle 95 % of the samples; NaN if one of them is NaN."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
