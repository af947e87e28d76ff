"""Examples read ahead by threads and processes, with Grain.

    read(0), read(1), ... --read_ahead, collate--> batch, batch, ...

What is read depends on its number alone, so a reader started at any number continues
one that has reached it, with any number of threads and workers. Grain could restore the
state of an iterator only on as many workers and hosts as saved it.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import grain

Example = TypeVar("Example")
Batch = TypeVar("Batch")

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # ignored by workers; their parent answers


def read_ahead(
    read: Callable[[int], Example],
    collate: Callable[[Sequence[Example]], Batch],
    batch_size: int,
    *,
    start: int = 0,
    stop: int = sys.maxsize,
    num_threads: int = 4,
    num_workers: int = 0,
) -> Generator[Batch, None, None]:
    """Reads examples `start`, `start` + 1, ... in order, ahead of their use.

    Closing the generator ends its reading threads and workers. Workers ignore Ctrl-C
    and SIGTERM, which a terminal or batch system sends to them too, and end when this
    process ends for any reason. They import its main module, as always with
    multiprocessing: a script needs `if __name__ == "__main__"`.

    Args:
      read: makes an example of its number; workers get a pickled copy.
      collate: makes a batch of consecutive examples, in this process.
      batch_size: examples of a batch; the last batch may have fewer.
      start: number of the first example.
      stop: number after that of the last example.
      num_threads: threads that read ahead in each process; 0 reads on demand.
      num_workers: processes that read ahead; 0 reads in this process.

    Yields:
      What `collate` returns.

    Raises:
      ChildProcessError: a worker was killed; raised with a batch.
      Any error of `read`, with its batch.
    """
    if start >= stop:
        return

    import grain  # takes a second, which `--help` and many tests can do without

    ahead = 2 * batch_size  # examples
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(ahead, num_threads)
    )
    dataset = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
    if num_workers:
        _allow_absl_flags()
        resource_tracker.ensure_running()  # started later, it would undo `_first`
        workers = grain.MultiprocessingOptions(
            num_workers=num_workers,
            per_worker_buffer_size=max(2, -(-ahead // num_workers)),
        )
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_serve_parent)
    yield from _until_closed(dataset.batch(batch_size, batch_fn=collate))


def _until_closed(
    dataset: "grain.IterDataset[Batch]",
) -> Generator[Batch, None, None]:
    iterator = iter(dataset)
    try:
        yield _first(iterator)
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise ChildProcessError(
            "a process that reads images was killed, perhaps for lack of memory; start "
            f"again, or with fewer: {error}"
        ) from error
    finally:
        iterator.close()  # type: ignore[attr-defined]  # ends the reading threads


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


def _allow_absl_flags() -> None:
    """Grain asks absl for flags as it starts workers; our programs have none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _serve_parent(index: int, count: int) -> None:
    """Runs first in worker `index` of `count`, and ties its life to its parent's."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    parent.join()
    os._exit(1)  # the main thread may be waiting on a full queue
