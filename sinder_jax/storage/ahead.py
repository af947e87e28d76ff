"""The next result is computed while the last one is used: reading beside writing."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Argument], Result], arguments: Iterable[Argument]
) -> Iterator[Result]:
    """`map(function, arguments)`, one call ahead of its consumer, in a thread.

    Two results are in memory at a time. An error is raised where its result is due.
    """
    with ThreadPoolExecutor(1) as thread:
        calls = (thread.submit(function, argument) for argument in arguments)
        end = Future[Result]()  # nobody waits for it
        for call, _ in pairwise(chain(calls, [end])):  # the second has been started
            yield call.result()
