"""What the unsupervised protocols share: tokens, and clusters matched with classes.

    scenes --crops, squares--> photographs --last block, normed--> tokens, kept
    tokens as they are and mirrored --a method's codes--> mean codes of an image
    codes --to pixels, compared with clusters; linear probe--> probabilities
    probabilities, photograph --dense CRF--> classes --counted--> cluster x class
    counts of all images --Hungarian--> mIoU, accuracy

Source: mhamilton723/STEGO eval_segmentation.py, CAUSE test_tr.py; SINDER's appendix
G.1 and G.2. Clusters are matched once for all images.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jaxtyping import Array, Float, Int64, UInt8
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.evaluation import images, survey
from experiments.evaluation.job import Job, Result, Scores
from experiments.evaluation.scene_training import digest
from experiments.study.cache import read_arrays, write_arrays
from sinder_jax import cli
from sinder_jax.data import crops, decode, masks, scenes
from sinder_jax.data.scenes import SAMPLES, AnyScene, Scenes
from sinder_jax.evals import bilinear, crf, features, metrics, probes
from sinder_jax.evals.features import BlockFeatures
from sinder_jax.model import Model
from sinder_jax.plots import scene_plots

CROPS: Mapping[str, Callable[[Sequence[AnyScene]], Sequence[Any]]] = {
    "none": list,
    "five": crops.five,
    "super": crops.super_crops,
}
LINEAR = "linear"  # counts whose name begins so are of classes, others of clusters
HEADLINE = ("cluster_miou", "cluster_acc", "linear_miou", "linear_acc")
AT_ONCE = 8  # images predicted between two files of counts
# What an image adds, by name: pixels of each class and cluster, [C labels, K clusters].
Counts = dict[str, Int64[np.ndarray, "... C K"]]


class Data(NamedTuple):
    """What `prepare` found.

    Attributes:
      found: the scenes.
      train: training images, cropped as the protocol says.
      num_classes: labels are below it; there are as many clusters.
      config: with every number filled in.
    """

    found: Scenes
    train: Sequence[AnyScene]
    num_classes: int
    config: ConfigDict


# --- Before anything is computed ------------------------------------------------------


def prepare(
    config: ConfigDict,
    models: Sequence[Model],
    published: Mapping[str, Any],
    short: Mapping[str, Any],
) -> Data:
    """Fills in the config, lists the scenes and reads every mask once.

    Args:
      config: of the protocol.
      models: to evaluate.
      published: what 0, or an empty text, of a key stands for.
      short: the same on `SAMPLES`.

    Raises:
      FileNotFoundError: something is missing; says what is expected where.
      ValueError: a setting out of range; a mask that does not fit.
    """
    filled = config.copy_and_resolve_references().unlock()
    for key, value in (short if config.data in SAMPLES else published).items():
        filled[key] = config[key] or value
    filled.lock()
    images.check_common(filled)
    for key, least in (("seeds", 1), ("save_every", 1), ("pictures", 0)):
        if filled[key] < least:
            raise ValueError(
                f"config.{key}: got {filled[key]}, expected at least {least}"
            )
    if filled.crops not in CROPS:
        raise ValueError(
            f"config.crops: got {filled.crops!r}, expected one of {', '.join(CROPS)}"
        )
    for key in ("train_size", "test_size"):
        for model in models:
            decode.check_side(f"config.{key}", filled[key], model.config.patch_size)
    found = scenes.open_scenes(filled.data, train_list=filled.train_list)
    if found.lacks:
        cli.warn(f"{filled.data}: {found.lacks}")
    count, _ = survey.check_masks(filled, found)
    return Data(found, CROPS[filled.crops](found.train), count, filled)


# --- Tokens and masks -----------------------------------------------------------------


def tokens(job: Job, split: str) -> Float[np.ndarray, "n h w D"]:
    """Patch tokens of the last block after the final norm; kept on the disk.

    Args:
      job: its data is a `Data`.
      split: "train", "val" or "val mirrored".

    Returns:
      A memory map; "val mirrored" has the tokens of mirrored images, as they come.
    """
    config, model = job.config, job.model
    size = config.train_size if split == "train" else config.test_size
    side = size // model.config.patch_size
    of = job.data.train if split == "train" else job.data.found.val
    mirrored = split == "val mirrored"
    square = functools.partial(
        _square, size=size, squash=config.squash, mirrored=mirrored
    )
    return images.cached(
        job,
        split,
        of,
        square,
        (side, side, model.config.embed_dim),
        {
            "features": "patch tokens",
            "square": size,
            "squash": config.squash,
            "mirrored": mirrored,
        },
        blocks=features.last_blocks(model.config, 1),
        of=_patches,
        batch_axis=0,
    )


def _square(
    scene: tuple[np.ndarray, np.ndarray], *, size: int, squash: bool, mirrored: bool
) -> UInt8[np.ndarray, "size size 3"]:
    pixels = crops.square(scene[0], size, squash=squash)
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels


def _patches(found: BlockFeatures) -> Float[Array, "B h w D"]:
    return found.patches[-1]


def masks_of(
    some: Sequence[AnyScene], config: ConfigDict, size: int
) -> UInt8[np.ndarray, "n size size"]:
    """The masks of some scenes as squares; 255 is ignored."""
    return np.stack(
        [crops.square(each.read_mask(), size, squash=config.squash) for each in some]
    )


# --- Evaluation -----------------------------------------------------------------------


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
    val: Float[np.ndarray, "n h w D"],
    labels: UInt8[np.ndarray, "n size size"],
) -> Counts:
    """Without mirrored images and CRF: `cluster_raw`, `linear_raw`, [n, C, K].

    Args:
      job: of the evaluation.
      segmenter: to evaluate, perhaps within its training.
      val: `tokens` of "val".
      labels: `masks_of` the validation images.
    """
    run = functools.partial(
        _probabilities, segmenter.codes, alpha=segmenter.alpha, size=labels.shape[-1]
    )
    arrays = segmenter.arrays()

    def of_image(i: int) -> list[np.ndarray]:
        found = np.asarray(jnp.argmax(run(arrays, (val[i],)), axis=-1))
        return [_counted(job, labels[i], each) for each in found]

    counted = np.array(_on_all_devices(of_image, range(len(val))))
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


# --- Result ---------------------------------------------------------------------------


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
        headline=HEADLINE,
        unit="%",
        evaluated=told,
        details={"iou": _iou_of_classes(data, total), "by_seed": by_seed},
        figures=figures,
    )


def score(names: Sequence[str], total: np.ndarray, num_images: int) -> Scores:
    """Percent, from counts summed over images, [names, C, K].

    mIoU is the mean over classes that are in the labels or the predictions, accuracy
    the share of right pixels. `map` is the mean over clusters of the share of their
    pixels that is right, CAUSE's "mAP".
    """
    del num_images  # pixels count, not images
    found = {}
    for name, matrix in zip(names, total, strict=True):
        right = matrix if name.startswith(LINEAR) else matched(matrix)
        scores = metrics.segmentation_scores(right)
        found[f"{name}_miou"] = 100 * scores.miou
        found[f"{name}_acc"] = 100 * scores.aacc
        if not name.startswith(LINEAR):
            found[f"{name}_map"] = 100 * _precision(right)
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
    """Percent by class, the mean over seeds; None for a class that is nowhere.

    Args:
      data: names the classes.
      totals: counts of clusters, summed over images, [seeds, C, K].
    """
    iou = np.mean(
        [100 * metrics.segmentation_scores(matched(each)).iou for each in totals],
        axis=0,
    )
    names = data.found.classes or map(str, range(data.num_classes))
    return {
        name: float(x) if np.isfinite(x) else None
        for name, x in zip(names, iou, strict=True)
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
