"""Photographs in: which ones, in which order, and batches of them for ever.

    spec --open_photographs--> photographs --training_list--> those to repair on
    photographs, start --stream--> Batch, Batch, ...      image k is photographs[k % n]

The position in the training list is one number k: nothing else is needed to continue,
whatever the hosts, processes and threads that read. `sources` says where photographs
lie and `decode` what is done to each; both can be had from here.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from sinder_jax.data.decode import (
    UnreadableImage,
    check_side,
    normalize,
    training_crop,
    training_keep,
)
from sinder_jax.data.listing import Photograph
from sinder_jax.families import Statistics

if TYPE_CHECKING:
    import grain

T = TypeVar("T")

# How a photograph becomes an image: the middle square, or nearly the whole.
RESIZES = {"crop": training_crop, "keep": training_keep}

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # workers leave them to their parent


class Batch(NamedTuple):
    """B images of a training list, in its order.

    Attributes:
      positions: the number k of each image, counted over all walks of the list.
      images: normalized pixels; zeros where the file could not be read. Height and
        width are `size`, except for `resize="keep"`.
      valid: False where the file could not be read.
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
      photographs: see `open_photographs`.
      num_images: how many are wanted, at least 1. Every n-th is taken, n being the
        whole part of len(photographs) / num_images and at least 1, so the result is
        somewhat longer than asked for, or all there are.
      shuffle_seed: of the order of the result; 0, as the authors', leaves it as it is.
        The same seed gives the same order with any release of NumPy.

    Raises:
      ValueError: `num_images` is below 1.
    """
    chosen = list(photographs[:: _every(photographs, num_images)])
    if not shuffle_seed:
        return chosen
    # Raw bits of PCG64, which NumPy promises to keep; what Generator makes of them it
    # may change, and a run that goes on after an update would see another order.
    keys = np.random.PCG64(shuffle_seed).random_raw(len(chosen))
    return [chosen[i] for i in np.argsort(keys, kind="stable")]


def held_out(photographs: Sequence[T], num_images: int) -> list[T]:
    """The photographs that are not on the training list, in their order.

    Raises:
      ValueError: `num_images` is below 1.
    """
    rest = list(photographs)
    del rest[:: _every(photographs, num_images)]
    return rest


def _every(photographs: Sequence[T], num_images: int) -> int:
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, and must be at least 1")
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
    """Reads a training list cyclically and for ever, from position `start` on.

    Image k is photographs[k % n], resized and normalized. The sequence is the same for
    any number of threads and workers, and a stream started at k continues one that got
    there: it is built anew from k, since a Grain iterator's own state is of use only to
    as many workers and hosts as wrote it. A file that cannot be read keeps its place:
    zeros, `valid` False and a message.

    Closing the stream ends the threads and processes that read ahead for it. Processes
    leave a Ctrl-C or SIGTERM, which a terminal or a batch system sends to them too, to
    this one, and end by themselves when this one is gone, however it ended. They import
    its main module, as ever with multiprocessing: a script needs `if __name__ ==
    "__main__"`.

    Args:
      photographs: the training list, n photographs.
      size: pixels of the short side, a multiple of `patch_size`.
      patch_size: pixels per patch side.
      statistics: of the images that the model was trained on.
      start: position of the first image of the first step, from 0.
      batch_size: images of a step, on all hosts together.
      part: (index, count): of `count` equal parts of each step only this one is read,
        as one host of several does. The parts are consecutive images.
      num_threads: threads that read ahead, in each process; 0 reads when asked.
      num_workers: processes that read ahead; 0 reads in this process.
      resize: "crop", the middle square as the authors; or "keep", nearly the whole
        photograph, cut to one of the seven shapes of `decode.buckets`, so that a step
        is compiled seven times at most. Images of different shapes make no batch: with
        "keep" `batch_size` is 1. A file that cannot be read has the square shape.

    Yields:
      Batches of batch_size / count images.

    Raises:
      ValueError: an empty list or an argument out of its range; raised by the call,
        not by the first batch.
      ChildProcessError: a worker was ended by someone else; raised by a batch.
    """
    check_side("size", size, patch_size)
    if not photographs:
        raise ValueError("the training list is empty: no images to stream")
    for name, value, least in (
        ("start", start, 0),
        ("batch_size", batch_size, 1),
        ("num_threads", num_threads, 0),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, and must be at least {least}")
    index, count = part
    if not 0 <= index < count:
        raise ValueError(f"part is {part}, and must be (index, count), index from 0")
    if batch_size % count:
        raise ValueError(
            f"batch_size is {batch_size}, and must be a multiple of the {count} parts"
        )
    check_resize(resize, batch_size)
    share = batch_size // count
    read = _Read(
        photographs, size, patch_size, resize, start + index * share, share, batch_size
    )

    import grain  # takes a second, which `--help` and tests of files need not wait for

    ahead = 2 * share  # images
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(ahead, num_threads)
    )
    dataset = grain.MapDataset.range(sys.maxsize).map(read).to_iter_dataset(options)
    if num_workers:
        _allow_absl_flags()
        resource_tracker.ensure_running()  # started later, it would undo `_first`
        workers = grain.MultiprocessingOptions(
            num_workers=num_workers,
            per_worker_buffer_size=max(2, -(-ahead // num_workers)),
        )
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_serve_parent)
    collate = functools.partial(_collate, statistics)
    return _until_closed(dataset.batch(share, batch_fn=collate))


def check_resize(resize: str, batch_size: int) -> None:
    """Raises ValueError unless images of a step can be resized so."""
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}, and must be {' or '.join(RESIZES)}")
    if resize == "keep" and batch_size != 1:
        raise ValueError(
            "resize=keep gives images of several shapes, so that a step takes one and "
            f"not {batch_size}"
        )


def _until_closed(dataset: "grain.IterDataset") -> Generator[Batch, None, None]:
    iterator = iter(dataset)
    try:
        yield _first(iterator)
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise ChildProcessError(
            f"a process that reads images ended before its time, maybe for want of "
            f"memory; start again, or with fewer: {error}"
        ) from error
    finally:
        iterator.close()  # ends the reading threads with the caller's loop


def _first(iterator: Iterator[Batch]) -> Batch:
    """The first batch, requested by a thread that blocks `SIGNALS`.

    Grain starts the workers at the first request, and a process inherits the blocked
    signals of the thread that starts it. So a signal cannot end a worker that is still
    importing, before `_serve_parent` makes it ignore the signal.
    """
    with ThreadPoolExecutor(
        1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, SIGNALS)
    ) as starter:
        return starter.submit(next, iterator).result()


class _Example(NamedTuple):
    position: int
    pixels: UInt8[np.ndarray, "height width 3"]  # a quarter of what floats would be
    error: str | None


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads the i-th image of one part of every step; sent to workers as it is."""

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
        except UnreadableImage as error:
            nothing = np.zeros((self.size, self.size, 3), np.uint8)
            return _Example(position, nothing, str(error))
        image = RESIZES[self.resize](image, self.size, patch_size=self.patch_size)
        return _Example(position, np.asarray(image), None)


def _collate(statistics: Statistics, examples: Sequence[_Example]) -> Batch:
    valid = np.array([example.error is None for example in examples])
    images = np.stack([normalize(example.pixels, statistics) for example in examples])
    images[~valid] = 0
    return Batch(
        positions=np.array([example.position for example in examples], np.int64),
        images=images,
        valid=valid,
        errors=[example.error for example in examples if example.error is not None],
    )


def _allow_absl_flags() -> None:
    """Grain asks absl for flags when it starts workers; our programs have none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _serve_parent(index: int, count: int) -> None:
    """Runs first in worker `index` of `count`: it lives as long as its parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    parent.join()
    os._exit(1)  # the main thread may wait for ever on a queue that nobody empties
