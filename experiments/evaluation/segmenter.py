"""From trained codes to counts of clusters and classes, image by image.

    tokens as they are and mirrored --a method's codes--> mean codes of an image
    codes --to pixels, compared with clusters; linear probe--> probabilities
    probabilities, photograph --dense CRF--> classes --counted--> cluster x class

Source: mhamilton723/STEGO eval_segmentation.py, CAUSE test_tr.py.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jaxtyping import Array, Float, Int64, UInt8

from experiments.evaluation.job import Job
from experiments.evaluation.scene_training import digest
from experiments.study.cache import read_arrays, write_arrays
from sinder_jax.data import crops, masks
from sinder_jax.evals import bilinear, crf, metrics, probes

AT_ONCE = 8  # images predicted between two files of counts
# What an image adds, by name: pixels of each class and cluster, [C labels, K clusters].
Counts = dict[str, Int64[np.ndarray, "... C K"]]


class Segmenter(NamedTuple):
    """A trained method.

    Attributes:
      codes: params and tokens [n, h, w, D] -> codes [n, h, w, Z], in evaluation mode; a
        pure function, the same object for every state of a method.
      params: of it, on the host.
      centroids: of the clusters, [K, Z].
      linear: the probe.
      alpha: sharpness of the clusters, see `probes.cluster_log_probabilities`.
    """

    codes: Callable[[Any, Array], Array]
    params: Any
    centroids: Float[np.ndarray, "K Z"]
    linear: probes.Linear
    alpha: float

    def arrays(self) -> Any:
        """All that training changed."""
        return (self.params, self.centroids, self.linear)


@functools.partial(jax.jit, static_argnames=("codes", "alpha", "size"))
def _probabilities(
    codes: Callable[[Any, Array], Array],
    arrays: Any,
    views: Sequence[Float[Array, "h w D"]],
    alpha: float,
    size: int,
) -> Float[Array, "2 size size K"]:
    """Of the clusters and of the linear probe, for every pixel of an image.

    Args:
      codes: of a `Segmenter`.
      arrays: likewise.
      views: tokens of the image, and of the mirrored image if both count.
      alpha: of a `Segmenter`.
      size: pixels of a side.
    """
    params, centroids, linear = arrays
    found = [codes(params, each[None])[0] for each in views]
    if len(found) == 2:
        found = [(found[0] + found[1][:, ::-1]) / 2]
    # Codes, not their cosines, are brought to pixels: the two do not commute.
    dense = bilinear.resize(found[0], (size, size))
    clusters = probes.cluster_log_probabilities(dense, centroids, alpha)
    return jnp.exp(jnp.stack([clusters, probes.log_probabilities(linear, dense)]))


def quick_counts(
    job: Job,
    segmenter: Segmenter,
    views: Sequence[Float[np.ndarray, "n h w D"]],
    labels: UInt8[np.ndarray, "n size size"],
) -> Counts:
    """Without a CRF: `cluster_raw`, `linear_raw`, [n, C, K]; keeps no files.

    Args:
      job: of the evaluation.
      segmenter: to evaluate, perhaps within its training.
      views: `tokens` of "val", and of "val mirrored" if both count.
      labels: `masks_of` the validation images.
    """
    run = functools.partial(
        _probabilities, segmenter.codes, alpha=segmenter.alpha, size=labels.shape[-1]
    )
    arrays = segmenter.arrays()

    def of_image(i: int) -> list[np.ndarray]:
        both = tuple(each[i] for each in views)
        found = np.asarray(jnp.argmax(run(arrays, both), axis=-1))
        return [_counted(job, labels[i], each) for each in found]

    counted = np.array(_on_all_devices(of_image, range(len(labels))))
    return {"cluster_raw": counted[:, 0], "linear_raw": counted[:, 1]}


def predictions(
    job: Job,
    segmenter: Segmenter,
    views: Sequence[Float[np.ndarray, "n h w D"]],
    rows: Sequence[int],
) -> list[Int64[np.ndarray, "kinds 2 size size"]]:
    """Clusters and probed classes of some validation images.

    Args:
      job: of the evaluation; `config.crf` False leaves the CRF out.
      segmenter: to evaluate.
      views: `tokens` of "val" and "val mirrored".
      rows: which images.

    Returns:
      Of each image: with CRF, if there is one, then without; clusters, then classes.
    """
    config = job.config

    def of_image(i: int) -> np.ndarray:
        both = tuple(each[i] for each in views)
        found = _probabilities(
            segmenter.codes,
            segmenter.arrays(),
            both,
            alpha=segmenter.alpha,
            size=config.test_size,
        )
        kinds = [found]
        if config.crf:
            pixels, _ = job.data.found.val[i].read()
            square = crops.square(pixels, config.test_size, squash=config.squash)
            kinds.insert(0, crf.mean_field(found, square))
        return np.array([np.argmax(each, axis=-1) for each in kinds])

    return _on_all_devices(of_image, rows)


def counts(
    job: Job,
    name: str,
    segmenter: Segmenter,
    views: Sequence[Float[np.ndarray, "n h w D"]],
    labels: UInt8[np.ndarray, "n size size"],
) -> Counts:
    """Counts of all validation images: `cluster`, `linear`, and both `_raw`: no CRF.

    Kept in files of `AT_ONCE` images for a start after a kill; named by the weights and
    the images, so that those of another state are never found.

    Args:
      job: of the evaluation.
      name: of the trained state, such as "seed0".
      segmenter: to evaluate.
      views: `tokens` of "val" and "val mirrored".
      labels: `masks_of` the validation images.
    """
    val = job.data.found.val
    told = serialization.to_bytes(jax.tree.map(np.asarray, segmenter.arrays()))
    weights = hashlib.sha256(told).hexdigest()
    counted: list[np.ndarray] = []
    job.progress.begin(f"predicting by {name}", len(val))
    for first in range(0, len(val), AT_ONCE):
        rows = range(first, min(first + AT_ONCE, len(val)))
        facts = weights + digest([val[i] for i in rows])
        key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = job.folder / name / f"counts_{first:06d}_{key}.npz"
        kept = read_arrays(path)
        if kept is None:
            found = predictions(job, segmenter, views, rows)
            kept = {
                "counts": np.array(
                    [
                        [[_counted(job, labels[i], x) for x in kind] for kind in each]
                        for i, each in zip(rows, found, strict=True)
                    ]
                )
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, kept)
        counted.append(kept["counts"])
        job.progress.at(first + len(rows))
    job.progress.end()
    joined = np.concatenate(counted)  # [n, with and without CRF, 2, C, K]
    named = {"cluster_raw": joined[:, -1, 0], "linear_raw": joined[:, -1, 1]}
    if job.config.crf:
        return {"cluster": joined[:, 0, 0], "linear": joined[:, 0, 1], **named}
    return {"cluster": named["cluster_raw"], "linear": named["linear_raw"]}


def _counted(job: Job, mask: np.ndarray, found: np.ndarray) -> np.ndarray:
    return metrics.confusion_matrix(mask, found, job.data.num_classes, masks.IGNORE)


def _on_all_devices(run: Callable[[int], Any], rows: Sequence[int]) -> list[Any]:
    """`run` of each row, one at a time on each device; in order."""
    devices = jax.local_devices()

    def on_device(i: int) -> Any:
        with jax.default_device(devices[i % len(devices)]):
            return run(i)

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(on_device, rows))
