"""Errors of stored files, and how an error is quoted inside another one."""

import os
import re

SYSTEM_ERROR = re.compile(r"\b(?:os_error_code='|OS error )(\d+)")


class DamagedError(ValueError):
    """Stored bytes are not what was written."""


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
