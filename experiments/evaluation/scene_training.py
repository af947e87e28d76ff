"""Trains a segmentation head on random crops: the features, the crops, the loop.

number --scene, seed--> Crop --normalize, pad--> images --Backbone--> features
features, labels --segmentation.make_step--> BatchNorm and a linear layer
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.evaluation import images, training
from experiments.evaluation.job import Job
from experiments.evaluation.schedule import Schedule
from sinder_jax import families, placement
from sinder_jax.data import reading, scene_crops
from sinder_jax.data.augment import Draws, shuffled
from sinder_jax.data.scene_crops import Crop, Examples
from sinder_jax.data.scenes import AnyScene, Scenes
from sinder_jax.evals import features, segmentation
from sinder_jax.model import Model


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


def digest(some: Sequence[AnyScene]) -> str:
    """Of the names, sizes and times of the files of some scenes."""
    facts = [[each.name, each.stamp()] for each in some]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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


def backbone(job: Job) -> Backbone:
    """Patch tokens of the last blocks, oldest first, after the final norm."""
    architecture, count = job.model.config, job.config.blocks
    extract = images.extractor(
        job,
        blocks=features.last_blocks(architecture, count),
        of=_side_by_side,
        batch_axis=0,
    )
    return Backbone(
        extract,
        count * architecture.embed_dim,
        architecture.patch_size,
        families.of(architecture).statistics,
    )


def _side_by_side(found: features.BlockFeatures) -> Array:
    return jnp.concatenate(list(found.patches), axis=-1)


def raw_colors(model: Model) -> Backbone:
    """The normalized pixels of each patch: what a model has to be better than."""
    patch = model.config.patch_size

    def pixels(some: Any) -> Array:
        n, height, width, colors = some.shape
        cells = jnp.asarray(some).reshape(
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
    """Trains one head, from where an earlier start was stopped; on the host.

    Raises:
      FloatingPointError: it diverged.
      UnreadableImage: a training image cannot be decoded.
    """
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
            stop=schedule.options.total_steps * per_step,
            num_threads=config.read_threads,
            num_workers=config.read_workers,
        )

    start = segmentation.init(jax.random.key(seed), source.channels, data.num_classes)
    plan = training.Plan(
        folder=job.folder / name / "head",
        key={
            "seed": seed,
            "channels": source.channels,
            "classes": data.num_classes,
            "training images": digest(data.found.train),
        },
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
    state = jax.tree.map(np.asarray, trained.state)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(state)):
        raise FloatingPointError(
            f"training {name} diverged, its weights are not finite: give a smaller "
            f"--config.lr than {schedule.options.lr:g}, and another --workdir"
        )
    return state


def _nothing(state: Any) -> training.Evaluation:
    """A head is evaluated apart: that takes longer than what a kill may cost."""
    del state
    return training.Evaluation({}, {})
