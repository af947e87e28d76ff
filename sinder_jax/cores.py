"""Linear algebra of many matrices on the host: one matrix a core at a time.

function, jobs --in_parallel--> results, in the order of the jobs
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

# A giant's largest kernel takes half a gigabyte of work space.
MOST_AT_ONCE = 16

Progress = Callable[[int, int], Any]
"""Called as `progress(done, total)` after each piece of a long computation."""

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def in_parallel(
    function: Callable[[_Job], _Result],
    jobs: Sequence[_Job],
    progress: Progress | None = None,
) -> Iterator[_Result]:
    """`function` of each job, in order, one job a core at a time.

    LAPACK makes little of several cores within one matrix, and with one thread each the
    result does not depend on how many there are. Where the caller's thread is
    interrupted, jobs that have not begun are left out.

    Args:
      function: of one job; may raise.
      jobs: any number.
      progress: called after each result, by the caller's thread.
    """
    workers = min(os.cpu_count() or 1, MOST_AT_ONCE)
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        for done, result in enumerate(pool.map(function, jobs), start=1):
            yield result
            if progress is not None:
                progress(done, len(jobs))
