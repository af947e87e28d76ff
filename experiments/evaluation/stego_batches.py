"""What STEGO's steps are given: an image, one of its neighbors, and the image's mask.

number --order, neighbors, seed--> image, positive --kept tokens, masks--> Batch
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8
from ml_collections import ConfigDict

from experiments.evaluation.scene_training import scene_of
from sinder_jax.data import crops, reading
from sinder_jax.data.augment import Draws
from sinder_jax.data.scenes import AnyScene
from sinder_jax.evals import stego

MASKS = 256  # squares of masks that a process keeps; all of a sample


class Batch(NamedTuple):
    """Images of a step.

    Attributes:
      features: tokens of the images.
      positives: of one neighbor each.
      labels: of the images; 255 is ignored.
    """

    features: Float[np.ndarray, "B h w D"]
    positives: Float[np.ndarray, "B h w D"]
    labels: UInt8[np.ndarray, "B size size"]


class Example(NamedTuple):
    """Which image, which neighbor, and the image's mask."""

    image: int
    positive: int
    labels: UInt8[np.ndarray, "size size"]


def pair(
    number: int, neighbors: Int32[np.ndarray, "n k"], per_step: int, seed: int
) -> tuple[int, int]:
    """The `number`-th image of a training, and its positive.

    Images as `scene_of` orders them; the positive is one of the neighbors 1 to 7, all
    equally likely: data.py `ContrastiveSegDataset`.
    """
    image = scene_of(number, len(neighbors), per_step, seed)
    which = stego.POSITIVES[Draws(seed, number).below(len(stego.POSITIVES))]
    return image, int(neighbors[image, which])


@dataclasses.dataclass(frozen=True)
class _Read:
    """Makes the `number`-th example; workers get a copy."""

    scenes: Sequence[Any]  # can be hashed
    neighbors: Int32[np.ndarray, "n k"]
    per_step: int
    seed: int
    size: int
    squash: bool

    def __call__(self, number: int) -> Example:
        """Raises UnreadableImage: a training leaves no image out."""
        image, positive = pair(number, self.neighbors, self.per_step, self.seed)
        labels = _labels(self.scenes[image], self.size, self.squash)
        return Example(image, positive, labels)


@functools.lru_cache(maxsize=MASKS)
def _labels(scene: Any, size: int, squash: bool) -> np.ndarray:
    return crops.square(scene.read_mask(), size, squash=squash)


def batches(
    scenes: Sequence[AnyScene],
    tokens: Float[np.ndarray, "n h w D"],
    neighbors: Int32[np.ndarray, "n k"],
    config: ConfigDict,
    seed: int,
    first: int,
) -> Generator[Batch, None, None]:
    """Batches of a training from step `first` on.

    Args:
      scenes: training images, for their masks.
      tokens: theirs, such as a memory map: only what a step needs is read.
      neighbors: of each, the nearest first.
      config: says how many images a step has, how many steps, and who reads.
      seed: of the training.
      first: step, from 0.

    Yields:
      A batch of step `first`, `first` + 1, ...

    Raises:
      UnreadableImage: a mask cannot be decoded.
    """
    per_step = config.images_per_step

    def collate(examples: Sequence[Example]) -> Batch:
        images, positives, labels = zip(*examples, strict=True)
        features, near = (
            np.stack([tokens[i] for i in rows]).astype(np.float32)
            for rows in (images, positives)
        )
        return Batch(features, near, np.stack(labels))

    return reading.read_ahead(
        _Read(scenes, neighbors, per_step, seed, config.train_size, config.squash),
        collate,
        per_step,
        start=first * per_step,
        stop=config.iterations * per_step,
        num_threads=config.read_threads,
        num_workers=config.read_workers,
    )
