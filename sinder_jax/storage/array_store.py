"""Named arrays in a checkpoint directory, written one by one, each with its digest.

    array, array, ... --writing--> DIR/arrays_0, arrays_1, ... + DIR/metadata
    DIR --Reader--> one array at a time, its SHA-256 verified

Every `arrays_N` is a PyTree checkpoint of Orbax, `metadata` its JSON item (`header`).
Orbax and TensorStore notice no flipped bit in what they store (of 180 single-bit flips
173 came back as other numbers), hence the digests; and saving a tree at once takes 2 to
3 times its memory, hence the parts.

On a disk, a directory is written under another name and renamed: it appears whole or
not at all. A bucket (gs://) cannot rename a directory at once, but a single object
appears whole. There `metadata` is written last: a directory without it is not a
checkpoint, and the next writer of that name replaces it.
"""

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from sinder_jax import param_tree
from sinder_jax.storage import files, header, orbax_io, paths
from sinder_jax.storage.errors import DamagedError, reading, reason_of
from sinder_jax.storage.paths import AnyPath, StrPath
from sinder_jax.storage.run_files import COMMITTED

PART_BYTES = 64 * 2**20  # a part is closed once it holds this much
# What Orbax, TensorStore and JSON raise on broken bytes.
BROKEN = (ValueError, KeyError, IndexError, TypeError, AttributeError)
PART = re.compile(r"metadata|arrays_\d+")


@contextmanager
def writing(path: StrPath, metadata: dict[str, Any]) -> Iterator["Writer"]:
    """Writes a directory array by array; leaving the `with` block completes it.

    If the block ends with an error, nothing is left behind. Waits for no other process:
    with many hosts, call it on process 0 alone.

    Args:
      path: a directory that does not exist, in one that does; or gs://bucket/name.
      metadata: JSON values; a dict that may be changed until the block ends.

    Yields:
      The writer of the arrays, at least one.

    Raises:
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: its directory is missing or not writable.
      ValueError: metadata that is not JSON, an array that cannot be stored, or a path
        that is not UTF-8.
      OSError: writing failed, for example on a full disk.
      RuntimeError: on another process than 0, whose arrays Orbax would leave out.
    """
    paths.check_is_text(path)
    paths.check_has_no_backslash(path)
    check_destination(path)
    orbax_io.check_may_write()
    header.check_json(metadata)
    path = paths.located(path)
    with _appearing(path) as target:
        writer = Writer(path, target)
        yield writer
        writer.complete(metadata)


@contextmanager
def _appearing(path: AnyPath) -> Iterator[AnyPath]:
    """Yields the directory to write to, which is at `path` if the block succeeds."""
    if not paths.is_remote(path):
        with files.replacing(path) as partial:
            partial.mkdir()
            yield partial
            check_destination(path)  # hours may have passed
        return
    paths.remove(path)  # left by a writer that was killed
    try:
        yield path
    except BaseException:
        paths.remove(path)
        raise


class Writer:
    """Adds arrays to the directory `target`, which will appear as `path`."""

    def __init__(self, path: AnyPath, target: AnyPath):
        self._path, self._target = path, target
        self._entries: dict[str, dict[str, Any]] = {}
        self._part: dict[str, np.ndarray] = {}
        self._num_parts = 0

    def write(self, name: str, array: Any) -> str:
        """Adds an array; returns its SHA-256.

        Args:
          name: text without a slash, or several such joined by slashes.
          array: numbers of any format, NumPy or JAX; not empty.
        """
        array = np.asarray(array)
        if name in self._entries:
            raise ValueError(f"{name} is written twice")
        self._entries[name] = header.entry(name, array, part=self._num_parts)
        self._part[name] = array
        if sum(each.nbytes for each in self._part.values()) >= PART_BYTES:
            self._close_part()
        return self._entries[name]["sha256"]

    def complete(self, metadata: Mapping[str, Any]) -> None:
        """Writes what is left: the last arrays, then the header."""
        if not self._entries:
            raise ValueError("the tree holds no array")
        saved = header.header(self._entries, metadata)
        if self._part:
            self._close_part()
        self._save("metadata", ocp.JsonCheckpointHandler, ocp.args.JsonSave(saved))

    def _close_part(self) -> None:
        args = orbax_io.arrays_args(param_tree.unflatten(self._part))
        self._save(f"arrays_{self._num_parts}", orbax_io.arrays_handler, args)
        self._part = {}
        self._num_parts += 1

    def _save(self, item: str, handler: Any, args: Any) -> None:
        try:
            with orbax_io.quiet(), orbax_io.checkpointer(handler) as checkpointer:
                checkpointer.save(self._target / item, args)
        except Exception as error:  # TensorStore raises ValueError for system errors
            orbax_io.wait_for_writes()
            raise OSError(
                f"{self._path}: cannot be written ({reason_of(error)})"
            ) from None


class Reader:
    """Reads what `writing` wrote.

    Args:
      path: the directory, on a disk or in a bucket.

    Attributes:
      metadata: the JSON values.
      arrays: {"shape", "dtype", "sha256", "part"} by name.

    Raises:
      FileNotFoundError: nothing is at `path`.
      DamagedError: its list of arrays is not as it was written.
      ValueError: something other than a checkpoint; every message is one line.
    """

    def __init__(self, path: StrPath):
        paths.check_is_text(path)
        paths.check_has_no_backslash(path)
        self._path = paths.located(path)
        found = _read_header(self._path)
        self.metadata: dict[str, Any] = found["metadata"]
        self.arrays: dict[str, dict[str, Any]] = found["arrays"]

    def read(self, name: str) -> np.ndarray:
        """Reads one array in its stored number format and verifies its digest.

        Raises:
          DamagedError: the bytes are not those that were written.
        """
        stored = self.arrays[name]
        self._check_shape(name, stored)
        array = self._restore(name, stored["part"])
        found = (list(array.shape), array.dtype.name, param_tree.digest_of_array(array))
        if found != tuple(stored[key] for key in ("shape", "dtype", "sha256")):
            raise self._damaged(f"the bytes of {name} are not those that were written")
        return array

    def read_all(self) -> dict[str, Any]:
        """All arrays as nested dicts."""
        return param_tree.unflatten({name: self.read(name) for name in self.arrays})

    def _check_shape(self, name: str, stored: Mapping[str, Any]) -> None:
        """Stops a damaged shape before TensorStore allocates memory for it."""
        folder = self._path / f"arrays_{stored['part']}" / name.replace("/", ".")
        with self._reading(name):
            shape = json.loads((folder / ".zarray").read_text())["shape"]
        if shape != stored["shape"]:
            raise self._damaged(
                f"{name} is stored as {shape}, its metadata says {stored['shape']}"
            )

    def _restore(self, name: str, part: int) -> np.ndarray:
        """Reads one array; of several, Orbax prints a traceback per broken one."""
        to_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        args = ocp.args.PyTreeRestore(
            param_tree.unflatten({name: np.empty(0)}),
            restore_args=param_tree.unflatten({name: to_numpy}),
            partial_restore=True,
        )
        with orbax_io.checkpointer(orbax_io.arrays_handler) as checkpointer:
            with self._reading(name):
                tree = checkpointer.restore(self._path / f"arrays_{part}", args)
        return param_tree.flatten(tree)[name]

    def _reading(self, name: str) -> AbstractContextManager[None]:
        return reading(
            self._path,
            BROKEN,
            lambda error: self._damaged(f"{name}: {reason_of(error)}"),
        )

    def _damaged(self, reason: str) -> DamagedError:
        return header.damaged(self._path, reason)


def _read_header(path: AnyPath) -> dict[str, Any]:
    with paths.answering(path):
        exists = path.exists()
    if not exists:
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file; a checkpoint is a directory, which "
            f"`python -m convert to-jax {path.name} DIR` makes of a PyTorch file"
        )
    if paths.is_remote(path) and _is_unfinished(path):
        raise ValueError(f"{path}: not a checkpoint, writing it was cut short")
    if not (path / "metadata").exists():
        raise ValueError(
            f"{path}: not a checkpoint of {header.FORMAT}, it holds no metadata"
        )

    def damaged(error: Exception) -> DamagedError:
        return header.damaged(path, f"metadata: {reason_of(error)}")

    with orbax_io.checkpointer(ocp.JsonCheckpointHandler) as checkpointer:
        with reading(path, BROKEN, damaged):
            found = checkpointer.restore(path / "metadata", ocp.args.JsonRestore())
    header.check_header(path, found)
    return found


def check_destination(path: StrPath) -> None:
    """Refuses a path that cannot be written to, before any work is done for it.

    Raises:
      FileExistsError: something is there.
      FileNotFoundError: the directory around it does not exist.
      PermissionError: the directory around it is not writable.
      OSError: its bucket does not answer.
    """
    path, remote = paths.located(path), paths.is_remote(path)
    with paths.answering(path):
        taken = path.exists() or (not remote and path.is_symlink())
        if taken and not (remote and _is_unfinished(path)):
            raise FileExistsError(f"{path} exists: remove it or choose another name")
    if remote:  # a bucket has no directories that could be missing
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory: create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} cannot be written to")


def _is_unfinished(path: AnyPath) -> bool:
    """True for a directory of a bucket that a killed writer left."""
    return (
        path.is_dir()
        and all(PART.fullmatch(part.name) for part in path.iterdir())
        and not (path / "metadata" / COMMITTED).exists()
    )


def tool() -> str:
    """Name and version of this program, as recorded in the files it writes."""
    try:
        return f"sinder_jax {importlib.metadata.version('sinder_jax')}"
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the sources
        return "sinder_jax"
