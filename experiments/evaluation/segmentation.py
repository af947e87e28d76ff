"""Linear segmentation: the protocols `segmentation_linear` and `_multiscale`.

    training scenes --random crops--> features --training--> BatchNorm, linear layer
    validation scenes --windows, sizes--> classes of pixels --areas--> mIoU, mAcc, aAcc

Source: dinov2/eval/segmentation, run by mmsegmentation 0.27; SINDER's appendix G.5.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.evaluation import schedule as schedules
from experiments.evaluation import sliding, training
from experiments.evaluation.job import Job, Result, Scores
from experiments.evaluation.schedule import Schedule
from experiments.evaluation.sliding import Predicted
from experiments.study.cache import read_arrays, write_arrays
from sinder_jax import cli, families, placement
from sinder_jax.data import masks, reading, scene_crops, scenes
from sinder_jax.data.augment import Draws, shuffled
from sinder_jax.data.scene_crops import Crop, Examples
from sinder_jax.data.scenes import AnyScene, Scenes
from sinder_jax.evals import features, metrics, segmentation
from sinder_jax.model import Model
from sinder_jax.plots import scene_plots

NAMES = ("miou", "macc", "aacc")
AT_ONCE = 32  # images predicted between two files of areas


class Data(NamedTuple):
    """What `prepare` found.

    Attributes:
      found: the scenes.
      num_classes: labels are below it.
      sizes: (height, width) of the validation masks.
      schedule: how a head is trained and applied.
    """

    found: Scenes
    num_classes: int
    sizes: Sequence[tuple[int, int]]
    schedule: Schedule

    @property
    def digest(self) -> str:
        """Of the names, sizes and times of all files."""
        every = (*self.found.train, *self.found.val)
        facts = [[each.name, each.stamp()] for each in every]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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
        features.last_blocks(model.config, config.blocks)
    found = scenes.open_scenes(config.data, train_list=config.train_list)
    if found.lacks:
        cli.warn(f"{config.data}: {found.lacks}")
    if len(found.train) < schedule.images_per_step:
        raise ValueError(
            f"{config.data}: got {len(found.train)} training images, expected at least "
            f"the {schedule.images_per_step} of a step; give "
            "--config.images_per_step=N"
        )
    count, sizes = _check_masks(config, found)
    return Data(found, count, sizes[len(found.train) :], schedule)


def _check_masks(
    config: ConfigDict, found: Scenes
) -> tuple[int, list[tuple[int, int]]]:
    """The number of classes, and the sizes of all masks."""
    named, given = len(found.classes), config.num_classes
    if named and given not in (0, named):
        raise ValueError(
            f"config.num_classes: got {given}, but {config.data} has {named} classes"
        )
    known = given or named
    largest, sizes = scenes.survey(
        [*found.train, *found.val], known, num_threads=config.read_threads
    )
    count = known or largest + 1
    if not 2 <= count <= masks.MOST_CLASSES:
        raise ValueError(
            f"{config.data}: the largest label is {largest}, which makes {count} "
            f"classes; expected 2 to {masks.MOST_CLASSES}, numbered from 0, and "
            f"{masks.IGNORE} only for pixels to ignore"
        )
    return count, sizes


# --- Features -------------------------------------------------------------------------


class Backbone(NamedTuple):
    """What a head is trained on.

    Attributes:
      features: normalized images, whole patches -> [n, h, w, channels].
      channels: of the features.
      patch: pixels of a patch.
      statistics: of the images that the model was trained on.
    """

    features: Callable[[Any], Array]
    channels: int
    patch: int
    statistics: families.Statistics


def backbone(config: ConfigDict, model: Model) -> Backbone:
    """Patch tokens of the last blocks, oldest first, after the final norm."""
    architecture = model.config
    extract = features.make_extract(
        architecture,
        model.params,
        blocks=features.last_blocks(architecture, config.blocks),
        of=_side_by_side,
        batch_axis=0,
        group=config.batch_size,
        precision=config.matmul_precision,
    )
    return Backbone(
        extract,
        config.blocks * architecture.embed_dim,
        architecture.patch_size,
        families.of(architecture).statistics,
    )


def _side_by_side(found: features.BlockFeatures) -> Array:
    return jnp.concatenate(list(found.patches), axis=-1)


def raw_colors(model: Model) -> Backbone:
    """The normalized pixels of each patch: what a model has to be better than."""
    patch = model.config.patch_size

    def pixels(images: Any) -> Array:
        n, height, width, colors = images.shape
        cells = jnp.asarray(images).reshape(
            n, height // patch, patch, width // patch, patch, colors
        )
        cells = jnp.transpose(cells, (0, 1, 3, 2, 4, 5))
        return cells.reshape(n, height // patch, width // patch, -1)

    statistics = families.of(model.config).statistics
    return Backbone(pixels, 3 * patch**2, patch, statistics)


# --- Training -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReadCrop:
    """Makes the `number`-th training crop; workers get a copy."""

    found: Sequence[AnyScene]
    schedule: Schedule
    seed: int

    def __call__(self, number: int) -> Crop:
        """Raises UnreadableImage: a training leaves no image out."""
        index = scene_of(
            number, len(self.found), self.schedule.images_per_step, self.seed
        )
        pixels, mask = self.found[index].read()
        return scene_crops.random_crop(
            pixels,
            mask,
            Draws(self.seed, number),
            size=self.schedule.crop,
            ratios=self.schedule.train_ratios,
        )


def scene_of(number: int, count: int, per_step: int, seed: int) -> int:
    """Which of `count` scenes is the `number`-th of a training.

    Each pass is in an order of its own. What is left of a pass beyond whole steps is
    dropped, as by mmsegmentation's loader.
    """
    step, within = divmod(number, per_step)
    passes, step = divmod(step, count // per_step)
    return shuffled(passes * count + step * per_step + within, count, seed)


def train(job: Job, source: Backbone, name: str, seed: int) -> Any:
    """Trains one head, from where an earlier start was stopped; on the host."""
    data: Data = job.data
    schedule, config = data.schedule, job.config
    per_step = schedule.images_per_step
    # Devices that divide a step; any number of them gives the same bits.
    devices = list(placement.over().mesh.devices.ravel())
    count = max(n for n in range(1, len(devices) + 1) if per_step % n == 0)
    sharding = placement.over(devices[:count])
    run = segmentation.make_step(schedule.options, sharding)
    padding = segmentation.center_padding(schedule.crop, source.patch)

    def step(state: Any, batch: Examples) -> tuple[Any, Array]:
        found = jax.device_put(source.features(batch.images), sharding)
        return run(state, found, jax.device_put(batch.labels, sharding))

    def batches(first: int) -> Generator[Examples, None, None]:
        return reading.read_ahead(
            ReadCrop(data.found.train, schedule, seed),
            functools.partial(
                scene_crops.collate,
                size=schedule.crop,
                padding=padding,
                statistics=source.statistics,
            ),
            per_step,
            start=first * per_step,
            num_threads=config.read_threads,
            num_workers=config.read_workers,
        )

    start = segmentation.init(jax.random.key(seed), source.channels, data.num_classes)
    plan = training.Plan(
        folder=job.folder / name / "head",
        key={"seed": seed, "channels": source.channels, "scenes": data.digest},
        total=schedule.options.total_steps,
        save_every=config.save_every,
        evaluate_every=0,
        label=f"training {name}",
    )
    trained = training.train(
        plan,
        placement.replicate(start, devices[:count]),
        step,
        batches,
        _nothing,
        progress=job.progress,
        stopping=job.stopping,
    )
    return jax.tree.map(np.asarray, trained.state)


def _nothing(state: Any) -> training.Evaluation:
    """A head is evaluated apart: that takes longer than what a kill may cost."""
    del state
    return training.Evaluation({}, {})


# --- Evaluation -----------------------------------------------------------------------


def evaluate(
    job: Job, source: Backbone, name: str, state: segmentation.SegmentationState
) -> np.ndarray:
    """Areas of each class in each validation image, [images, 3, classes].

    Kept in files of `AT_ONCE` images, for a start after a kill.
    """
    found = job.data.found.val
    job.progress.begin(f"predicting by {name}", len(found))
    areas: list[np.ndarray] = []
    for first in range(0, len(found), AT_ONCE):
        part = found[first : first + AT_ONCE]
        path = job.folder / name / f"areas_{first:06d}.npz"
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
    sources = {"": backbone(config, job.model)}
    if config.raw_colors:
        sources["raw_color_"] = raw_colors(job.model)
    counts = []
    figures: dict[str, Figure] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        of_seed = []
        for prefix, source in sources.items():
            name = f"{prefix}seed{seed}"
            state = train(job, source, name, seed)
            of_seed.append(evaluate(job, source, name, state))
            if config.pictures and not figures:
                part = data.found.val[: config.pictures]
                shown = [
                    (x.pixels, x.classes, x.mask)
                    for x in predictions(job, source, state, part)
                ]
                figures["scenes"] = scene_plots.scenes(shown, data.found.classes)
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
        "data": data.found.title,
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
        "mirrored, too": config.flip,
        "seeds": config.seeds,
    }


def _range(sides: np.ndarray) -> str:
    low, high = int(sides.min()), int(sides.max())
    return str(low) if low == high else f"{low}-{high}"
