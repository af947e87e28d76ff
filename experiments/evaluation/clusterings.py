"""What a method must be better than: k-means of the tokens, and of the colors.

training tokens, of unit length --k-means--> centroids --cosine--> clusters of pixels
colors of training pixels      --k-means--> centroids --distance--> clusters of pixels
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8
from scipy.cluster import vq

from experiments.evaluation import segmenter
from experiments.evaluation.job import Job
from experiments.evaluation.segmenter import Counts, Segmenter
from sinder_jax.data import crops, masks
from sinder_jax.evals import metrics, probes

DRAWN = 20_000  # tokens, and pixels, that k-means is given
IMAGES = 500  # whose colors are drawn
ITERATIONS = 50


def counts(
    job: Job,
    seed: int,
    train: Float[np.ndarray, "n h w D"],
    views: Sequence[Float[np.ndarray, "m h w D"]],
    labels: UInt8[np.ndarray, "m size size"],
) -> Counts:
    """Counts of `kmeans_tokens` and `kmeans_colors`, each [m, C, K].

    Args:
      job: of the evaluation.
      seed: of what is drawn, and of k-means++.
      train: tokens of the training images.
      views: tokens of the validation images, and of the mirrored ones if both count.
      labels: their masks.
    """
    rng = np.random.default_rng(seed)
    rows = _some(train.reshape(-1, train.shape[-1]), rng).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    count = job.data.num_classes
    centroids = _kmeans(rows, count, rng).astype(np.float32)
    unused = probes.Linear(jnp.zeros((centroids.shape[1], count)), jnp.zeros(count))
    clusters = Segmenter(_as_they_are, (), centroids, unused, 1.0)
    of_tokens = segmenter.quick_counts(job, clusters, views, labels)
    return {
        "kmeans_tokens": of_tokens["cluster_raw"],
        "kmeans_colors": _of_colors(job, rng, labels),
    }


def _as_they_are(params: Any, tokens: Array) -> Array:
    del params
    return tokens


def _of_colors(job: Job, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    config, data = job.config, job.data
    chosen = rng.permutation(len(data.train))[:IMAGES]
    pixels = [
        crops.square(data.train[i].read()[0], config.train_size, squash=config.squash)
        for i in chosen
    ]
    rows = _some(np.stack(pixels).reshape(-1, 3), rng).astype(np.float64)
    centroids = _kmeans(rows, data.num_classes, rng)
    counted = []
    for scene, mask in zip(data.found.val, labels, strict=True):
        image = crops.square(scene.read()[0], config.test_size, squash=config.squash)
        found, _ = vq.vq(image.reshape(-1, 3).astype(np.float64), centroids)
        counted.append(
            metrics.confusion_matrix(
                mask, found.reshape(mask.shape), data.num_classes, masks.IGNORE
            )
        )
    return np.array(counted)


def _some(
    rows: Shaped[np.ndarray, "n D"], rng: np.random.Generator
) -> Shaped[np.ndarray, "drawn D"]:
    """`DRAWN` of the rows, or all of fewer."""
    return rows[np.sort(rng.permutation(len(rows))[:DRAWN])]


def _kmeans(
    rows: Float[np.ndarray, "n D"], count: int, rng: np.random.Generator
) -> Float[np.ndarray, "count D"]:
    centroids, _ = vq.kmeans2(
        rows, count, iter=ITERATIONS, minit="++", missing="warn", rng=rng
    )
    return centroids
