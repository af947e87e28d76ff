"""What CAUSE's steps are given: tokens of some images, their masks, and a key.

number of a step --Order--> images --kept tokens, masks--> Batch
"""

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments.evaluation.job import Job
from sinder_jax import placement
from sinder_jax.data import crops, reading
from sinder_jax.data.augment import shuffled


class Batch(NamedTuple):
    """What a step is given, on the first device.

    Attributes:
      features: tokens [B, h, w, D].
      labels: uint8 [B, size, size]; 255 is ignored. Empty for a stage without labels.
      key: of the step.
    """

    features: Array
    labels: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class Order:
    """Which images the steps of a training see.

    Attributes:
      count: training images.
      per_step: images of a step.
      steps: of an epoch, which may see a share of the images only: a new one each time,
        drawn from all. The original's last step of an epoch is smaller; here it is
        filled up.
      seed: of the training.
    """

    count: int
    per_step: int
    steps: int
    seed: int

    def images(self, step: int) -> list[int]:
        """The images of a step; steps are counted over all epochs."""
        epoch, within = divmod(step, self.steps)
        places = range(within * self.per_step, (within + 1) * self.per_step)
        return [
            shuffled(epoch * self.count + place % self.count, self.count, self.seed)
            for place in places
        ]


@dataclasses.dataclass(frozen=True)
class _Read:
    """Makes the mask of the `number`-th image; workers get a copy."""

    scenes: Sequence[Any]
    order: Order
    size: int
    squash: bool
    labeled: bool

    def __call__(self, number: int) -> tuple[int, np.ndarray]:
        """Raises UnreadableImage: a training leaves no image out."""
        step, within = divmod(number, self.order.per_step)
        image = self.order.images(step)[within]
        if not self.labeled:
            return image, np.zeros((0, 0), np.uint8)
        mask = self.scenes[image].read_mask()
        return image, crops.square(mask, self.size, squash=self.squash)


def batches(
    job: Job,
    tokens: Float[np.ndarray, "n h w D"],
    order: Order,
    steps: range,
    key: Array,
    *,
    labeled: bool,
) -> Generator[Batch, None, None]:
    """Batches of some steps.

    Args:
      job: says how masks are read.
      tokens: of the training images, such as a memory map.
      order: of the images.
      steps: which ones, counted over all epochs.
      key: that of each step is folded out of it.
      labeled: False: masks are not read.

    Raises:
      UnreadableImage: a mask cannot be decoded.
    """
    config, device = job.config, placement.first()

    def collate(examples: Sequence[tuple[int, np.ndarray]]) -> Any:
        rows, labels = zip(*examples, strict=True)
        features = np.stack([tokens[i] for i in rows]).astype(np.float32)
        return features, np.stack(labels)

    read = reading.read_ahead(
        _Read(job.data.train, order, config.train_size, config.squash, labeled),
        collate,
        order.per_step,
        start=steps.start * order.per_step,
        stop=steps.stop * order.per_step,
        num_threads=config.read_threads,
        num_workers=config.read_workers,
    )
    with closing(read):
        for step, arrays in zip(steps, read, strict=True):
            features, labels = jax.device_put(arrays, device)
            yield Batch(features, labels, jax.random.fold_in(key, step))
