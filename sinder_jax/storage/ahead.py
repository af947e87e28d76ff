"""The next result is computed while the last one is used: reading beside writing."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
        due: Future[Result] | None = None
        for argument in arguments:
            following = thread.submit(function, argument)
            if due is not None:
                yield due.result()
            due = following
        if due is not None:
            yield due.result()
