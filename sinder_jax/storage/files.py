"""Files and folders that appear whole or not at all, on a disk and in a bucket.

    path --replacing--> a local path to write to --flushed, renamed--> path
                                                 --uploaded--> path in a bucket
    path, content --write--> the file
    path, content --create--> the file, unless there is one

A rename may reach the disk before the bytes that it publishes: after a power loss the
new name would then hold nothing. So the bytes are flushed first.
"""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sinder_jax.storage import paths
from sinder_jax.storage.errors import reason_of
from sinder_jax.storage.paths import StrPath


@contextmanager
def replacing(
    path: StrPath,
    staging: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Yields a local path to write to; what is there at the end moves to `path`.

    It is in a temporary folder, and every file that is written beside it moves along.
    On a disk a rename moves it at once; what appears survives a power loss. Into a
    bucket it is uploaded. After an exception nothing is left.

    Args:
      path: a file, replaced if it exists, or a folder that does not exist; on a disk
        its own folder must exist.
      staging: a folder of the same disk, in which the temporary folder is made; None:
        beside `path`.
      check: called right before anything moves; raises to prevent it.

    Raises:
      OSError: the file or folder cannot be written; names `path`.
    """
    path = paths.as_path(path)
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
            check()
            upload(Path(folder), path.parent)
        return
    # Names that begin so are ours, or were left by a killed process of the same number.
    # In a container that is always 1: only the rest of the name is never used twice.
    ours = Path(staging or path.parent, f".{path.name}.{os.getpid()}.")
    for left in ours.parent.glob(f"{glob.escape(ours.name)}*partial"):
        with suppress(OSError):  # another user's, or read-only: it does no harm
            remove(left)
    try:
        with tempfile.TemporaryDirectory(
            ".partial", ours.name, ours.parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder, path.name)
            check()
            for made in sorted(Path(folder).iterdir()):
                flush(made)
                os.replace(made, path.parent / made.name)
            flush_entry(Path(path.parent))
    except OSError as error:
        if error.errno is None or not str(error.filename or ours).startswith(str(ours)):
            raise  # names what is wrong already
        raise type(error)(f"{path} cannot be written: {reason_of(error)}") from None


def flush(path: Path) -> None:
    """Waits until a file, or a folder with all it holds, is on the disk."""
    for below in path.rglob("*"):
        flush_entry(below)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Waits until a file's bytes, or a folder's list of names, are on the disk."""
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    except OSError as error:  # not every file system can flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(entry)


def remove(path: Path) -> None:
    """Removes a local file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def write(path: StrPath, content: str | bytes) -> None:
    """Writes a file whole or not at all; text as `encoded`.

    Raises:
      OSError: the file cannot be written; names `path`.
    """
    with replacing(path) as partial:
        partial.write_bytes(encoded(content) if isinstance(content, str) else content)


def encoded(text: str) -> bytes:
    """Text as UTF-8; in file names that are not, surrogates are escaped as in JSON."""
    return text.encode(errors="backslashreplace")


def create(path: StrPath, content: str) -> None:
    """Writes a small new file; of several processes that try, one succeeds.

    Raises:
      FileExistsError: there is a file already, perhaps not all of it yet.
      OSError: the file cannot be written.
    """
    path = paths.as_path(path)
    if paths.is_remote(path):
        with paths.answering(path):
            # "create": if no generation of the object exists, as the bucket decides.
            paths.bucket_client().pipe_file(str(path), content.encode(), mode="create")
        return
    with Path(path).open("x") as file:
        file.write(content)


def upload(folder: Path, target: paths.AnyPath) -> None:
    """Copies all files below a local folder to the same names in a bucket."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            place = target / file.relative_to(folder).as_posix()
            with paths.answering(place):
                place.write_bytes(file.read_bytes())
