"""The training list, and an endless stream of batches from it.

    photographs --training_list--> n photographs to repair on; --held_out--> the others
    n photographs, start --stream--> Batch, Batch, ...    image k is photographs[k % n]

One number k is the position in the stream: a run continues from k on any number of
hosts, processes and threads.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from sinder_jax.data import decode, reading
from sinder_jax.data.listing import Photograph
from sinder_jax.families import Statistics

T = TypeVar("T")

# Ways to cut a photograph: to the middle square, or hardly at all.
RESIZES = {"crop": decode.training_crop, "keep": decode.training_keep}


class Batch(NamedTuple):
    """B consecutive images of the stream.

    Attributes:
      positions: number k of each image, counted over all passes through the list.
      images: normalized pixels; zeros where the file is unreadable. Height and width
        are `size`, except with `resize="keep"`.
      valid: False where the file is unreadable.
      errors: one message per unreadable file, in the order of `positions`.
    """

    positions: Int64[np.ndarray, " B"]
    images: Float32[np.ndarray, "B height width 3"]
    valid: Bool[np.ndarray, " B"]
    errors: list[str]


# --- The training list ----------------------------------------------------------------


def training_list(
    photographs: Sequence[T], num_images: int, *, shuffle_seed: int = 0
) -> list[T]:
    """Thins a list to about `num_images`, evenly (the authors' slice).

    Args:
      photographs: see `listing.open_photographs`.
      num_images: photographs wanted, at least 1. Takes every n-th, where n is
        len(photographs) // num_images and at least 1, so the result is somewhat longer
        than `num_images`, or the whole list.
      shuffle_seed: of the order of the result; 0 keeps the order, as the authors do.
        A seed gives the same order with every release of NumPy.

    Raises:
      ValueError: `num_images` is below 1.
    """
    chosen = list(photographs[:: _every(photographs, num_images)])
    if not shuffle_seed:
        return chosen
    # NumPy promises to keep the raw bits of PCG64, but not what Generator makes of
    # them: after an update a resumed run would see another order.
    keys = np.random.PCG64(shuffle_seed).random_raw(len(chosen))
    return [chosen[i] for i in np.argsort(keys, kind="stable")]


def held_out(photographs: Sequence[T], num_images: int) -> list[T]:
    """The photographs that `training_list` leaves out, in their order.

    Raises:
      ValueError: `num_images` is below 1.
    """
    rest = list(photographs)
    del rest[:: _every(photographs, num_images)]
    return rest


def _every(photographs: Sequence[T], num_images: int) -> int:
    if num_images < 1:
        raise ValueError(f"got num_images={num_images}, expected at least 1")
    return max(1, len(photographs) // num_images)


# --- The stream -----------------------------------------------------------------------


def stream(
    photographs: Sequence[Photograph],
    size: int,
    *,
    patch_size: int,
    statistics: Statistics,
    start: int = 0,
    batch_size: int = 1,
    part: tuple[int, int] = (0, 1),
    num_threads: int = 4,
    num_workers: int = 0,
    resize: str = "crop",
) -> Generator[Batch, None, None]:
    """Reads a training list over and over, from position `start` on.

    Image k is photographs[k % n], resized and normalized, for any number of threads and
    workers. A stream started at k continues one that has reached k. An unreadable file
    keeps its place, with zeros for pixels. Closing the stream ends its reading threads
    and workers, see `reading.read_ahead`.

    Args:
      photographs: the training list, n photographs.
      size: pixels of the short side, a multiple of `patch_size`.
      patch_size: pixels per patch side.
      statistics: of the images that the model was trained on.
      start: position of the first image of the first step, from 0.
      batch_size: images of a step, on all hosts together.
      part: (index, count): reads only this one of `count` equal parts of each step, as
        one of several hosts does. A part is consecutive images.
      num_threads: threads that read ahead in each process; 0 reads on demand.
      num_workers: processes that read ahead; 0 reads in this process.
      resize: "crop", the authors' middle square; or "keep", nearly the whole
        photograph, cut to one of the seven shapes of `decode.buckets`, so that a step
        is compiled at most seven times. As shapes differ, "keep" needs `batch_size` 1.
        An unreadable file has the square shape.

    Yields:
      Batches of batch_size / count images.

    Raises:
      ValueError: the list is empty or an argument out of range; raised by the call, not
        by the first batch.
      ChildProcessError: a worker was killed; raised with a batch.
    """
    decode.check_side("size", size, patch_size)
    if not photographs:
        raise ValueError("the training list is empty: no images to stream")
    for name, value, least in (
        ("start", start, 0),
        ("batch_size", batch_size, 1),
        ("num_threads", num_threads, 0),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"got {name}={value}, expected at least {least}")
    index, count = part
    if not 0 <= index < count:
        raise ValueError(f"got part={part}, expected (index, count), index from 0")
    if batch_size % count:
        raise ValueError(
            f"got batch_size={batch_size}, expected a multiple of the {count} parts"
        )
    check_resize(resize, batch_size)
    share = batch_size // count
    read = _Read(
        photographs, size, patch_size, resize, start + index * share, share, batch_size
    )
    collate = functools.partial(_collate, statistics)
    return reading.read_ahead(
        read, collate, share, num_threads=num_threads, num_workers=num_workers
    )


def check_resize(resize: str, batch_size: int) -> None:
    """Raises ValueError unless `resize` is known and allows this batch size."""
    if resize not in RESIZES:
        raise ValueError(f"got resize={resize!r}, expected {' or '.join(RESIZES)}")
    if resize == "keep" and batch_size != 1:
        raise ValueError(
            f"got {batch_size} images per step, expected 1: resize=keep gives images "
            "of several shapes"
        )


class _Example(NamedTuple):
    position: int
    pixels: UInt8[np.ndarray, "height width 3"]  # a quarter of the size of floats
    error: str | None


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads the i-th image of one part of every step; workers get a copy."""

    photographs: Sequence[Photograph]
    size: int
    patch_size: int
    resize: str
    start: int  # position of the first image of this part
    share: int  # images of a step in this part
    stride: int  # images of a step in all parts

    def __call__(self, i: int) -> _Example:
        step, within = divmod(i, self.share)
        position = self.start + step * self.stride + within
        photograph = self.photographs[position % len(self.photographs)]
        try:
            image = photograph.read()
        except decode.UnreadableImage as error:
            nothing = np.zeros((self.size, self.size, 3), np.uint8)
            return _Example(position, nothing, str(error))
        image = RESIZES[self.resize](image, self.size, patch_size=self.patch_size)
        return _Example(position, np.asarray(image), None)


def _collate(statistics: Statistics, examples: Sequence[_Example]) -> Batch:
    valid = np.array([example.error is None for example in examples])
    pixels = (example.pixels for example in examples)
    images = np.stack([decode.normalize(each, statistics) for each in pixels])
    images[~valid] = 0
    return Batch(
        positions=np.array([example.position for example in examples], np.int64),
        images=images,
        valid=valid,
        errors=[example.error for example in examples if example.error is not None],
    )
