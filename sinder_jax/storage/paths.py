"""Paths on a disk and in a bucket, used alike.

    "runs/giant", "gs://bucket/giant" --as_path--> a path with the methods of pathlib

A bucket holds objects, not directories: one object appears whole; a directory is what
the names of its objects have in common, and renaming it copies them one by one.
"""

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

BUCKET = "gs://"
StrPath = str | os.PathLike[str]
if TYPE_CHECKING:
    AnyPath = Path  # whose methods a bucket's paths mimic
else:
    AnyPath = Path | epath.Path  # on a disk, in a bucket


def as_path(path: StrPath) -> AnyPath:
    """A path with the methods of pathlib, on a disk or in a bucket.

    Args:
      path: a text may begin with ~, for a home folder.

    Raises:
      ValueError: another kind of store, an unknown home folder, or the package that
        reads gs:// is missing.
    """
    text = expanded(path) if isinstance(path, str) else os.fspath(path)
    if "://" not in text:
        return Path(text)
    if not text.startswith(BUCKET):
        raise ValueError(f"{text}: only paths on a disk and {BUCKET} can be used")
    try:
        importlib.import_module("gcsfs")  # by which epath reads gs://
    except ImportError:
        raise ValueError(f"{text} needs gcsfs: pip install 'sinder_jax[gcs]'") from None
    return epath.Path(text)  # type: ignore[return-value]


def expanded(text: str) -> str:
    """A path in which ~ and ~user at the start are a home folder.

    Raises:
      ValueError: there is no such user.
    """
    found = os.path.expanduser(text)
    if found.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(
            f"{text}: there is no home folder {user}; if that is the name of a file or "
            f"folder, write ./{text}"
        )
    return found


def located(path: StrPath) -> AnyPath:
    """Like `as_path`, and absolute if the path is on a disk."""
    found = as_path(path)
    return found if is_remote(found) else found.absolute()


def check_is_text(path: StrPath) -> None:
    """Refuses a path that is not UTF-8, for libraries that take no other.

    Raises:
      ValueError: says what to do.
    """
    try:
        os.fspath(located(path)).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{path}: got a name that is not UTF-8, which TensorStore and PyTorch "
            "cannot open; rename it or choose another"
        ) from None


def check_has_no_backslash(path: StrPath) -> None:
    """Refuses a path with a backslash, which TensorStore takes for a slash.

    Raises:
      ValueError: arrays would be written to another folder, or read from there.
    """
    if "\\" in os.fspath(located(path)):
        raise ValueError(
            f"{path}: got a backslash in the path, which TensorStore takes for a "
            "slash; rename the folder or choose another"
        )


def is_remote(path: StrPath) -> bool:
    """True if the path is in a bucket (gs://)."""
    return os.fspath(path).startswith(BUCKET)


def check_apart(destination: StrPath, *sources: StrPath) -> None:
    """Refuses a destination that is a source, or lies in one or around one.

    Raises:
      ValueError: names both; symbolic links are followed.
    """
    target = _resolved(destination)
    for source in sources:
        read = _resolved(source)
        if target == read or read in target.parents or target in read.parents:
            raise ValueError(
                f"{destination} is in, around, or the same as {source}, which is read: "
                "choose a place outside it"
            )


def _resolved(path: StrPath) -> AnyPath:
    found = as_path(path)
    return found if is_remote(found) else Path(os.path.realpath(found))


def remove(path: AnyPath) -> None:
    """Removes a directory and all it holds, if it exists."""
    if is_remote(path):
        epath.Path(path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def bucket_client() -> Any:
    """The client of gs:// that epath uses, for what epath cannot do."""
    return importlib.import_module("fsspec").filesystem("gs")


def names(folder: AnyPath) -> list[str]:
    """Names in a folder as it is now; a bucket's client remembers an earlier listing.

    Empty if there is no such folder.
    """
    try:
        if not is_remote(folder):
            return os.listdir(folder)
        with answering(folder):
            found = bucket_client().ls(str(folder), detail=False, refresh=True)
        return [name.rpartition("/")[2] for name in found]
    except FileNotFoundError:
        return []


@contextmanager
def answering(path: AnyPath) -> Iterator[None]:
    """Raises errors of a bucket's libraries as an OSError of one line.

    Raises:
      OSError: as it is, or in place of any other error.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise OSError(f"{path} cannot be reached ({reason})") from None
