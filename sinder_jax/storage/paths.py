"""Places on a disk and in a bucket, addressed alike.

    "runs/giant", "gs://bucket/giant" --as_path--> a path to ask, open and join

A bucket holds objects, not directories: one object appears whole, a directory is what
its objects' names have in common, and renaming it copies them one after the other.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

BUCKET = "gs://"
StrPath = str | os.PathLike[str]
if TYPE_CHECKING:
    AnyPath = Path  # whose methods those of a bucket's paths mimic
else:
    AnyPath = Path | epath.Path  # of a disk, of a bucket


def as_path(path: StrPath) -> AnyPath:
    """A path with the methods of pathlib's, of a disk or of a bucket.

    Raises:
      ValueError: it names another kind of store, or what reads gs:// is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(text)
    if not text.startswith(BUCKET):
        raise ValueError(f"{text}: only paths of a disk and {BUCKET} can be used.")
    if not _is_installed("gcsfs"):
        raise ValueError(f"{text} needs gcsfs: pip install 'sinder_jax[gcs]'")
    return epath.Path(text)  # type: ignore[return-value]


def located(path: StrPath) -> AnyPath:
    """As `as_path`; absolute, if it is of a disk."""
    found = as_path(path)
    return found if is_remote(found) else found.absolute()


def is_remote(path: StrPath) -> bool:
    """Whether it is of a bucket."""
    return os.fspath(path).startswith(BUCKET)


def remove(path: AnyPath) -> None:
    """Removes a directory, if it is there, with all that it holds."""
    if is_remote(path):
        epath.Path(path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def answering(path: AnyPath) -> Iterator[None]:
    """Tells in one line what the libraries of a bucket say of credentials and names.

    Raises:
      OSError: as it is, or in place of any other error.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        reason = f"{type(error).__name__}: {line}"
        raise OSError(f"{path} cannot be reached ({reason}).") from None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # blocked in sys.modules
        return False
