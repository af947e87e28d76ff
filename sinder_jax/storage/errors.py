"""Errors of stored files: what is damage and what is not; how an error is quoted.

a library reads broken bytes and raises anything --reading--> DamagedError
the disk, the system or the memory fails --reading--> OSError, MemoryError
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SYSTEM_ERROR = re.compile(r"\b(?:os_error_code='|OS error )(\d+)")
# What the system answers if bytes name a file that is not there, or an odd place in
# one. Anything else it says about the disk, the permissions, or this process.
OF_BYTES = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.EOVERFLOW,
    errno.ENAMETOOLONG,
)


class DamagedError(ValueError):
    """Stored bytes are not what was written."""


@contextmanager
def reading(
    path: object,
    kinds: tuple[type[Exception], ...],
    damaged: Callable[[Exception], Exception],
) -> Iterator[None]:
    """Tells damage from faults of the machine while a library reads a file.

    Put little into the block but the library's call: a mistake of ours would be taken
    for damage too.

    Args:
      path: of the file, for messages.
      kinds: what the library raises on broken bytes, besides OSError.
      damaged: makes the error to raise for broken bytes, from the library's.

    Raises:
      OSError: the file cannot be read: names `path`.
      What `damaged` returns: the bytes are broken.
      Any other error, as it is.
    """
    try:
        yield
    except Exception as error:
        of_machine = isinstance(error, (MemoryError, ImportError))
        if of_machine or not isinstance(error, (OSError, *kinds)):
            raise
        number = _system_error(error)
        if number is not None and number not in OF_BYTES:
            reason = f"{path} cannot be read: {os.strerror(number)}"
            raise OSError(reason) from None
        raise damaged(error) from None


def _system_error(error: BaseException) -> int | None:
    """Number of the system's error that a library raised in words of its own."""
    if code := SYSTEM_ERROR.search(str(error)):
        return int(code[1])
    return error.errno if isinstance(error, OSError) else None


def reason_of(error: BaseException, limit: int = 200) -> str:
    """First line of an error, short enough to quote; for a system error its text.

    TensorStore wraps the system's error into an error and words of its own.
    """
    if code := SYSTEM_ERROR.search(str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error).strip() or "no reason given").splitlines()[0]
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return f"{type(error).__name__}: {line}"
