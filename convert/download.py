"""One file over HTTP: resumable, by one process at a time, whole or not at all.

    <file>.partial + <file>.partial.json --resume point--> size, and what it is part of
    size --Range, If-Range--> the rest of the bytes, or all of them --append--> .partial
    <file>.partial, once it is whole and on disk --rename--> <file>

Nothing that a server says is part of a file's name.
"""

import dataclasses
import fcntl
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import filesize, progress
from rich.console import Console

TIMEOUT = 30.0  # seconds without an answer, or without a byte of it
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try that brings nothing
CHUNK = 1 << 18  # bytes


class Failed(Exception):
    """Why the file did not come, in words that follow "not fetched: "."""


class DiskFull(Failed):
    """The file needs more bytes than are free; none of them was written."""


class _Interrupted(Failed):
    """Trying again may help."""


class _Unreachable(_Interrupted):
    """Trying again may help if it has worked before."""


def download(url: str, path: Path) -> None:
    """Puts the file at `url` there, unless another process has done it meanwhile.

    What came of an interrupted download is kept beside `path`, and the next one of the
    same address goes on there. Progress is shown on stderr.

    Args:
      url: an http or https address.
      path: the file to make; folders above it are made too.

    Raises:
      Failed: no network, no such file, a server that never ends …
      DiskFull: the disk of `path` is too small for it.
      OSError: `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if path.is_file():
            return
        partial = _partial(path)
        size, version = _resume_point(url, partial)
        # Equal if the last process ended between the last byte and the new name.
        if version is None or size != version.total:
            with _Display(url, path) as display:
                _complete(url, partial, display)
        os.replace(partial, path)
        _side_file(partial).unlink(missing_ok=True)


def kept(url: str, path: Path) -> int:
    """Number of bytes that `download` would not ask for again."""
    return _resume_point(url, _partial(path))[0]


def reason(error: Exception) -> str:
    """The first line of an error, or of the one inside it, without a full stop."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, Exception):
        return reason(inner)
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text or type(error).__name__).splitlines()[0][:200].rstrip(".")


# --- One process at a time --------------------------------------------------------


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time fetch `path`; the others wait and find it done.

    A lock rather than a partial file per process: only a file with a fixed name can be
    gone on with. The system lifts the lock of a process that dies. The empty lock file
    stays: removed, it could be locked by one process and made again by another.
    """
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.name}: another process fetches it; waiting.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- Tries ------------------------------------------------------------------------


def _complete(url: str, partial: Path, display: "_Display") -> None:
    # The most there ever was, so that starting over again and again is no progress.
    start = most = _resume_point(url, partial)[0]
    failures = 0
    while True:
        try:
            return _try(url, partial, display)
        except _Interrupted as error:
            size, _ = _resume_point(url, partial)
            if size > most:
                most, failures = size, 0
            # Without a network there is nothing to wait for; half-way there is.
            hopeless = isinstance(error, _Unreachable) and most == start
            if hopeless or failures == len(WAITS):
                raise
        time.sleep(WAITS[failures])
        failures += 1


def _try(url: str, partial: Path, display: "_Display") -> None:
    size, known = _resume_point(url, partial)
    headers = {}
    if known is not None and size:
        # If-Range: the whole file rather than its rest if it is not the same any more.
        headers = {"Range": f"bytes={size}-", "If-Range": known.validator}
    with _open(url, partial, headers) as response:
        version = _version(url, response)
        if response.status != 206:
            _start_over(partial)
            size = 0
            _check_space(partial.parent, version.total)
            _side_file(partial).write_text(json.dumps(dataclasses.asdict(version)))
        # Not every server knows If-Range.
        elif version != known or _range_start(response) != size:
            _start_over(partial)
            raise _Interrupted("the file changed on the server")
        display.begin(size, version.total)
        _append(response, partial, version.total - size, display)


def _append(
    response: http.client.HTTPResponse, partial: Path, rest: int, display: "_Display"
) -> None:
    with open(partial, "ab") as file:
        while rest:
            try:
                chunk = response.read1(min(CHUNK, rest))
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(f"connection lost ({reason(error)})") from None
            if not chunk:
                raise _Interrupted(f"connection ended {rest} bytes early")
            file.write(chunk)
            rest -= len(chunk)
            display.advance(len(chunk))
        # What has its final name is never looked at again: not before it is on disk.
        file.flush()
        os.fsync(file.fileno())


def _check_space(directory: Path, total: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < total:
        raise DiskFull(
            f"it needs {filesize.decimal(total)} and {filesize.decimal(free)} are free "
            f"in {directory}"
        )


# --- The part that is there -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Version:
    """Which file a part belongs to; `validator` is "" if the server gives none."""

    url: str
    validator: str
    total: int  # bytes


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _side_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _resume_point(url: str, partial: Path) -> tuple[int, _Version | None]:
    """Size of the part and what it is part of; 0 and None if it cannot be used."""
    try:
        stored = json.loads(_side_file(partial).read_text())
        version = _Version(url, str(stored["validator"]), int(stored["total"]))
        usable = stored["url"] == url and version.validator
        size = partial.stat().st_size
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged
        return 0, None
    return (size, version) if usable and size <= version.total else (0, None)


def _start_over(partial: Path) -> None:
    # The bytes first: never old ones beside a side file that speaks of new ones.
    partial.unlink(missing_ok=True)
    _side_file(partial).unlink(missing_ok=True)


# --- HTTP -------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to HTTP and HTTPS, and never from HTTPS back to HTTP."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and scheme != req.type:
            msg = f"redirect to {newurl}, which is not HTTPS"
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, partial: Path, headers: dict[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(
        url, headers={"User-Agent": "sinder_jax"} | headers
    )
    opener = urllib.request.build_opener(_Redirects)
    try:
        return opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # the rest that was asked for does not exist
                _start_over(partial)
            kind = Failed
            if error.code in (408, 416, 429) or error.code >= 500:
                kind = _Interrupted
            raise kind(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(f"no connection ({reason(error)})") from None


def _version(url: str, response: http.client.HTTPResponse) -> _Version:
    headers = response.headers
    kind = headers.get_content_type()
    encoding = headers.get("Content-Encoding", "identity")
    # HTML is, say, a portal asking for a login.
    if kind == "text/html" or encoding != "identity":
        raise Failed(f"the server sent {kind} ({encoding}), not a file of weights")
    if response.status == 206:
        length = headers.get("Content-Range", "").rpartition("/")[2]
    else:
        length = headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else 0
    if response.status != 206 and total == 0:
        raise Failed("the server does not say how long the file is")
    etag = headers.get("ETag", "")
    # Only a strong ETag promises the same bytes.
    strong = etag if etag.startswith('"') else ""
    return _Version(url, strong or headers.get("Last-Modified", ""), total)


def _range_start(response: http.client.HTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


# --- What the user sees -----------------------------------------------------------


class _Display:
    """A bar on a terminal; elsewhere a line at the start and one at the end."""

    def __init__(self, url: str, path: Path):
        console = Console(stderr=True, highlight=False)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console, self._url, self._path = console, url, path
        self._task: progress.TaskID | None = None

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self._bar.stop()
        if kind is None:
            self._print(f"{self._path}: fetched.")

    def begin(self, size: int, total: int) -> None:
        if self._task is not None:
            self._bar.reset(self._task, completed=size, total=total)
            return
        # Not an update: what was there before would count as speed.
        name = self._path.name
        self._task = self._bar.add_task(name, completed=size, total=total)
        there = f" from {filesize.decimal(size)} on" if size else ""
        self._print(f"{self._url}: fetching {filesize.decimal(total)}{there}.")

    def advance(self, size: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, size)

    def _print(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)
