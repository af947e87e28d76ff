"""Predicts the class of every pixel of photographs, window by window.

    photographs --sizes, mirrored, cut--> windows --in batches--> logits of patches
    logits of an image's windows --merged, mean of softmax--> classes of its pixels

Source: mmsegmentation 0.27, `slide_inference`, `aug_test` and `MultiScaleFlipAug`.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from experiments.evaluation.schedule import Schedule
from sinder_jax.data import decode, opencv, reading, scene_crops
from sinder_jax.data.masks import Mask
from sinder_jax.data.opencv import Pixels
from sinder_jax.data.scenes import AnyScene
from sinder_jax.evals import segmentation
from sinder_jax.families import Statistics

ROOM = 64  # results have sides of a multiple of this, so that few shapes are compiled


class Views(NamedTuple):
    """A photograph in every size, and its mask in its own."""

    sizes: list[Pixels]
    pixels: Pixels
    mask: Mask


class Predicted(NamedTuple):
    """A photograph, its mask, and the class predicted for every pixel."""

    pixels: Pixels
    mask: Mask
    classes: UInt8[np.ndarray, "height width"]


@dataclasses.dataclass(frozen=True)
class ReadViews:
    """Reads scene `i` and resizes it; workers get a copy."""

    scenes: Sequence[AnyScene]
    shorts: Sequence[int]  # pixels of the short side, by ratio

    def __call__(self, i: int) -> Views:
        """Raises UnreadableImage: an evaluation leaves no image out."""
        pixels, mask = self.scenes[i].read()
        height, width = mask.shape
        sizes = [
            opencv.resize(pixels, scene_crops.resized_to(height, width, short))
            for short in self.shorts
        ]
        return Views(sizes, pixels, mask)


class Model(NamedTuple):
    """What turns windows into logits.

    Attributes:
      logits: normalized windows [n, height, width, 3] -> logits of patches.
      statistics: by which windows are normalized.
      patch: pixels of a patch.
      batch: windows at a time.
    """

    logits: Callable[[np.ndarray], Float[Array, "n h w classes"]]
    statistics: Statistics
    patch: int
    batch: int


def predict(
    model: Model,
    scenes: Sequence[AnyScene],
    schedule: Schedule,
    *,
    num_threads: int,
    num_workers: int,
) -> Iterator[Predicted]:
    """Yields the prediction of each scene, in order.

    Raises:
      UnreadableImage: a file cannot be decoded.
    """
    shorts = segmentation.short_sides(schedule.crop, schedule.ratios)
    read = reading.read_ahead(
        ReadViews(scenes, shorts),
        lambda views: views[0],
        1,
        stop=len(scenes),
        num_threads=num_threads,
        num_workers=num_workers,
    )
    waiting: deque[Views] = deque()  # whose windows have been asked for

    def windows() -> Iterator[np.ndarray]:
        for views in read:
            waiting.append(views)
            for image, _ in _images(views, schedule):
                rows, columns = _spans(image, schedule)
                for y, x in itertools.product(rows, columns):
                    yield _window(image[slice(*y), slice(*x)], model)

    with closing(read):
        logits = _logits(model, windows())
        for first in logits:
            views = waiting.popleft()
            own = itertools.chain([first], logits)
            yield Predicted(
                views.pixels, views.mask, _classes(views, own, model.patch, schedule)
            )


def _images(views: Views, schedule: Schedule) -> Iterator[tuple[Pixels, bool]]:
    """What is predicted of a photograph: every size, as it is and mirrored."""
    for image in views.sizes:
        for flip in schedule.flips:
            yield (np.ascontiguousarray(image[:, ::-1]) if flip else image), flip


def _steps(length: int, schedule: Schedule) -> tuple[int, int]:
    """Pixels of a window along an axis, and from one to the next."""
    return (length, length) if schedule.whole else (schedule.crop, schedule.stride)


def _spans(image: Pixels, schedule: Schedule) -> list[list[tuple[int, int]]]:
    return [
        segmentation.windows(side, *_steps(side, schedule)) for side in image.shape[:2]
    ]


def _window(pixels: Pixels, model: Model) -> np.ndarray:
    window = decode.normalize(pixels, model.statistics)
    sides = [segmentation.center_padding(n, model.patch) for n in window.shape[:2]]
    return np.pad(window, [*sides, (0, 0)])


def _logits(model: Model, windows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Logits of each window; windows of one shape go through the model together."""
    running: deque[Any] = deque()
    for batch in _batches(windows, model.batch):
        running.append(model.logits(np.stack(batch)))
        if len(running) > 1:  # the device works on the next batch meanwhile
            yield from np.asarray(running.popleft())
    for last in running:
        yield from np.asarray(last)


def _batches(windows: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for window in windows:
        if batch and (len(batch) == size or window.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _classes(
    views: Views, logits: Iterator[np.ndarray], patch: int, schedule: Schedule
) -> UInt8[np.ndarray, "height width"]:
    """Takes the logits of a photograph's windows, in their order, and merges them."""
    height, width = views.mask.shape
    total: Any = 0.0
    for image, flip in _images(views, schedule):
        down, across = (len(spans) for spans in _spans(image, schedule))
        own = np.stack(list(itertools.islice(logits, down * across)))
        rows, columns = (
            _weights(length, size, patch, schedule)
            for length, size in zip(image.shape[:2], (height, width), strict=True)
        )
        if flip:  # mirrors the result back
            columns[:width] = columns[:width][::-1].copy()
        own = own.reshape(down, across, *own.shape[1:])
        total = total + segmentation.probabilities(own, rows, columns)
    return np.asarray(_largest(total))[:height, :width]


@jax.jit
def _largest(probabilities: Array) -> Array:
    return jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)


def _weights(length: int, size: int, patch: int, schedule: Schedule) -> np.ndarray:
    crop, stride = _steps(length, schedule)
    weights = segmentation.merge_weights(
        length, size, crop=crop, stride=stride, patch=patch
    )
    return np.pad(weights, [(0, -size % ROOM), (0, 0)]).astype(np.float32)
