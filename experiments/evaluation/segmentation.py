"""Linear segmentation: the protocols `segmentation_linear` and `_multiscale`.

    training scenes --random crops--> features --training--> BatchNorm, linear layer
    validation scenes --windows, sizes--> classes of pixels --areas--> mIoU, mAcc, aAcc

Source: dinov2/eval/segmentation, run by mmsegmentation 0.27; SINDER's appendix G.5.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import serialization
from jaxtyping import Array
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.evaluation import scene_training, sliding, survey
from experiments.evaluation import schedule as schedules
from experiments.evaluation.job import Job, Result, Scores
from experiments.evaluation.scene_training import Backbone, Data
from experiments.evaluation.sliding import Predicted
from experiments.study.cache import read_arrays, write_arrays
from sinder_jax import cli
from sinder_jax.data import masks, scenes
from sinder_jax.data.scenes import AnyScene
from sinder_jax.evals import features, metrics, segmentation
from sinder_jax.model import Model
from sinder_jax.plots import scene_plots

NAMES = ("miou", "macc", "aacc")
AT_ONCE = 32  # images predicted between two files of areas


# --- Before anything is computed ------------------------------------------------------


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Lists both splits, reads every mask once, and settles the schedule.

    Raises:
      FileNotFoundError: something is missing; says what is expected where.
      ValueError: a setting out of range, a mask that does not fit its image, a label
        beyond the classes, too few images.
    """
    schedule = schedules.settle(config)
    for model in models:
        try:
            features.last_blocks(model.config, config.blocks)
        except ValueError as error:
            raise ValueError(f"config.blocks: {error}") from None
    found = scenes.open_scenes(config.data, train_list=config.train_list)
    if found.lacks:
        cli.warn(f"{config.data}: {found.lacks}")
    if len(found.train) < schedule.images_per_step:
        raise ValueError(
            f"{config.data}: got {len(found.train)} training images, expected at least "
            f"the {schedule.images_per_step} of a step; give "
            "--config.images_per_step=N"
        )
    count, sizes = survey.check_masks(config, found)
    return Data(found, count, sizes[len(found.train) :], schedule)


# --- Evaluation -----------------------------------------------------------------------


def evaluate(
    job: Job, source: Backbone, name: str, state: segmentation.SegmentationState
) -> np.ndarray:
    """Areas of each class in each validation image, [images, 3, classes].

    Kept in files of `AT_ONCE` images, for a start after a kill; named by the head and
    the images, so that those of another head are never found.
    """
    found = job.data.found.val
    head = hashlib.sha256(serialization.to_bytes(state)).hexdigest()
    job.progress.begin(f"predicting by {name}", len(found))
    areas: list[np.ndarray] = []
    for first in range(0, len(found), AT_ONCE):
        part = found[first : first + AT_ONCE]
        facts = head + scene_training.digest(part)
        key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = job.folder / name / f"areas_{first:06d}_{key}.npz"
        kept = read_arrays(path)
        if kept is None:
            kept = {"areas": _areas(job, source, state, part, first)}
            write_arrays(path, kept)
        areas.append(kept["areas"])
        job.progress.at(first + len(part))
    job.progress.end()
    return np.concatenate(areas)


def _areas(
    job: Job,
    source: Backbone,
    state: segmentation.SegmentationState,
    part: Sequence[AnyScene],
    first: int,
) -> np.ndarray:
    areas = []
    for each in predictions(job, source, state, part):
        counts = metrics.confusion_matrix(
            each.mask, each.classes, job.data.num_classes, masks.IGNORE
        )
        areas.append([counts.diagonal(), counts.sum(1), counts.sum(0)])
        job.progress.at(first + len(areas))
    return np.array(areas)


def predictions(
    job: Job,
    source: Backbone,
    state: segmentation.SegmentationState,
    part: Sequence[AnyScene],
) -> Iterator[Predicted]:
    """The classes of the pixels of some scenes, in order."""

    def logits(windows: np.ndarray) -> Array:
        return segmentation.patch_logits(state, source.features(windows))

    model = sliding.Model(
        logits,
        source.statistics,
        source.patch,
        batch=job.config.batch_size * len(jax.devices()),
    )
    return sliding.predict(
        model,
        part,
        job.data.schedule,
        num_threads=job.config.read_threads,
        num_workers=job.config.read_workers,
    )


def run(job: Job) -> Result:
    """Trains a head from every seed, and evaluates it on the validation images."""
    config, data = job.config, job.data
    sources = {"": scene_training.backbone(job)}
    if config.raw_colors:
        sources["raw_color_"] = scene_training.raw_colors(job.model)
    counts = []
    figures: dict[str, Figure] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        of_seed = []
        for prefix, source in sources.items():
            name = f"{prefix}seed{seed}"
            state = scene_training.train(job, source, name, seed)
            of_seed.append(evaluate(job, source, name, state))
            if config.pictures and not figures:
                part = data.found.val[: config.pictures]
                shown = [
                    (x.pixels, x.classes, x.mask)
                    for x in predictions(job, source, state, part)
                ]
                figures["scenes"] = scene_plots.scenes(
                    shown, data.found.classes, data.found.palette
                )
        counts.append(np.stack(of_seed, axis=1))
    prefixes = tuple(sources)
    areas = np.stack(counts).astype(np.float64)  # [seeds, images, sources, 3, classes]
    return Result(
        counts=areas,
        score=functools.partial(score, prefixes),
        headline=tuple(f"{p}{n}" for p in prefixes for n in NAMES),
        unit="%",
        evaluated=evaluated(job),
        details={"iou": iou_of_classes(data, areas[:, :, 0].sum(1))},
        figures=figures,
    )


def score(prefixes: Sequence[str], total: np.ndarray, num_images: int) -> Scores:
    """Percent, from the areas summed over images, [sources, 3, classes]."""
    del num_images  # pixels count, not images
    found = {}
    for prefix, areas in zip(prefixes, total, strict=True):
        scores = metrics.scores_of_areas(*areas)
        for name in NAMES:
            found[f"{prefix}{name}"] = 100 * getattr(scores, name)
    return found


def iou_of_classes(data: Data, areas: np.ndarray) -> dict[str, float | None]:
    """Percent by class, the mean over seeds; None for a class that is nowhere.

    Args:
      data: names the classes.
      areas: summed over images, [seeds, 3, classes].
    """
    iou = np.mean([100 * metrics.scores_of_areas(*each).iou for each in areas], axis=0)
    names = data.found.classes or map(str, range(data.num_classes))
    return {
        name: float(x) if np.isfinite(x) else None
        for name, x in zip(names, iou, strict=True)
    }


def evaluated(job: Job) -> dict[str, Any]:
    """What was evaluated and how, for the reader."""
    config, data = job.config, job.data
    schedule, options = data.schedule, data.schedule.options
    shorts, longs = np.sort(data.sizes, axis=1).T
    window = f"{schedule.crop} every {schedule.stride}"
    if schedule.whole:
        window = "whole images"
    return {
        "data": data.found.title + ", incomplete" * bool(data.found.lacks),
        "training images": len(data.found.train),
        "images": len(data.found.val),
        "masks": f"{_range(longs)} x {_range(shorts)} pixels, as they are",
        "classes": data.num_classes,
        "blocks": config.blocks,
        "iterations": options.total_steps,
        "images per step": schedule.images_per_step,
        "crop": schedule.crop,
        "learning rate": options.lr,
        "windows": window,
        "ratios": " ".join(f"{ratio:g}" for ratio in schedule.ratios),
        "flip": config.flip,
        "seeds": config.seeds,
    }


def _range(sides: np.ndarray) -> str:
    low, high = int(sides.min()), int(sides.max())
    return str(low) if low == high else f"{low}-{high}"
