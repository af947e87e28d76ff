"""Named arrays in a directory, written one by one, each with its digest.

    array, array, ... --Writer--> DIR/arrays_0, arrays_1, ... + DIR/metadata
    DIR --Reader--> one array at a time, its SHA-256 verified

Every `arrays_N` is a PyTree checkpoint of Orbax, `metadata` its JSON item. Orbax and
TensorStore notice no flipped bit in what they store (of 180 single-bit flips 173 came
back as other numbers), hence the digests; and saving a tree at once takes 2 to 3 times
its memory, hence the parts.

A directory on a disk is written under another name and renamed: it appears whole or not
at all. In a bucket (gs://) nothing can be renamed at once, but a single object appears
whole. There `metadata` is written last: a directory without it is no checkpoint, and is
replaced by the next one of that name.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from sinder_jax import param_tree
from sinder_jax.storage import paths
from sinder_jax.storage.paths import AnyPath, StrPath
from sinder_jax.storage.run_files import COMMITTED

FORMAT = "sinder_jax"
VERSION = 2
PART_BYTES = 64 * 2**20  # a part is closed once it holds this much
# Measured on 480 MB: chunks of this size save twice as fast and with two thirds of the
# memory of one chunk an array, with files of their own (no OCDBT) four times as fast.
CHUNK_BYTES = 32 * 2**20
NAME = re.compile(r"[\w-]+(/[\w-]+)*")  # a dot would be a slash on disk
SYSTEM_ERROR = re.compile(r"\b(?:os_error_code='|OS error )(\d+)")
PART = re.compile(r"metadata|arrays_\d+")
JOIN_TIMEOUT = 60  # seconds: a disk that hangs must not keep an error from being told


class DamagedError(ValueError):
    """Stored bytes are not what was written."""


class Writer:
    """Writes a directory array by array; leaving the `with` block completes it.

    Where the block ends with an error nothing is left behind. It waits for no other
    process: of many hosts, use it on process 0 alone.

    Args:
      path: a directory that does not exist, in one that does; or gs://bucket/name.
      metadata: JSON values; a dict that may be changed until the block ends.

    Raises:
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: the directory around it is missing or closed.
      ValueError: metadata that is no JSON, or an array that cannot be stored.
      OSError: writing failed, for example on a full disk.
      RuntimeError: on another process than 0, whose arrays Orbax would leave out.
    """

    def __init__(self, path: StrPath, metadata: dict[str, Any]):
        check_destination(path)
        if jax.process_index():
            raise RuntimeError(f"process {jax.process_index()} must leave saving to 0.")
        self.metadata = metadata
        self._path = paths.located(path)
        self._entries: dict[str, dict[str, Any]] = {}
        self._part: dict[str, np.ndarray] = {}
        self._num_parts = 0

    def __enter__(self) -> Any:  # itself, of any subclass
        _json(self.metadata)
        self._undo = ExitStack()
        if paths.is_remote(self._path):
            paths.remove(self._path)  # what a writer that was killed has left
            self._undo.callback(paths.remove, self._path)
            self._target = self._path
            return self
        # A directory beside the destination: renaming is atomic there.
        staging = tempfile.TemporaryDirectory(
            prefix=f".{self._path.name}.", dir=self._path.parent
        )
        self._target = Path(self._undo.enter_context(staging), self._path.name)
        self._target.mkdir()
        return self

    def write(self, name: str, array: Any) -> str:
        """Adds an array; gives its SHA-256.

        Args:
          name: text without a slash, or several such joined by slashes.
          array: numbers of any format, of NumPy or JAX; not empty.
        """
        array = np.asarray(array)
        check_storable(name, array)
        if name in self._entries:
            raise ValueError(f"{name} is written twice.")
        sha256 = param_tree.digest_of_array(array)
        self._entries[name] = entry(array, sha256, part=self._num_parts)
        self._part[name] = array
        if sum(each.nbytes for each in self._part.values()) >= PART_BYTES:
            self._close_part()
        return sha256

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        with self._undo:
            if kind is None:
                self._complete()

    def _complete(self) -> None:
        if not self._entries:
            raise ValueError("the tree holds no array.")
        saved = header(self._entries, self.metadata)
        if self._part:
            self._close_part()
        self._save("metadata", ocp.JsonCheckpointHandler, ocp.args.JsonSave(saved))
        if paths.is_remote(self._path):
            self._undo.pop_all()  # without running them: it stays
            return
        check_destination(self._path)  # hours may have passed
        os.rename(self._target, self._path)

    def _close_part(self) -> None:
        tree, self._part = traverse_util.unflatten_dict(self._part, sep="/"), {}
        self._save(f"arrays_{self._num_parts}", arrays_handler, arrays_args(tree))
        self._num_parts += 1

    def _save(self, item: str, handler: Any, args: Any) -> None:
        try:
            with quiet(), _checkpointer(handler) as checkpointer:
                checkpointer.save(self._target / item, args)
        except Exception as error:  # TensorStore has no OSError: its are ValueErrors
            wait_for_writes()
            raise OSError(
                f"{self._path}: cannot be written ({reason_of(error)})."
            ) from None


class Reader:
    """Reads what `Writer` wrote.

    Args:
      path: the directory, of a disk or a bucket.

    Attributes:
      metadata: the JSON values.
      arrays: by name, {"shape", "dtype", "sha256", "part"}.

    Raises:
      FileNotFoundError: nothing is at `path`.
      DamagedError: its list of arrays is not as it was written.
      ValueError: it is something else; every message is one line.
    """

    def __init__(self, path: StrPath):
        self._path = paths.located(path)
        read = _read_header(self._path)
        self.metadata: dict[str, Any] = read["metadata"]
        self.arrays: dict[str, dict[str, Any]] = read["arrays"]

    def read(self, name: str) -> np.ndarray:
        """One array in its stored number format, its digest verified.

        Raises:
          DamagedError: the bytes are not those that were written.
        """
        stored = self.arrays[name]
        self._check_shape(name, stored)
        array = self._restore(name, stored["part"])
        found = {"shape": list(array.shape), "dtype": array.dtype.name}
        want = {key: stored[key] for key in found}
        if found != want:
            raise self._damaged(f"{name} is {found}, its metadata says {want}")
        if param_tree.digest_of_array(array) != stored["sha256"]:
            raise self._damaged(f"the bytes of {name} are not those that were written")
        return array

    def _check_shape(self, name: str, stored: Mapping[str, Any]) -> None:
        """Before a damaged shape makes TensorStore take all memory there is."""
        folder = self._path / f"arrays_{stored['part']}" / name.replace("/", ".")
        try:
            shape = json.loads((folder / ".zarray").read_text())["shape"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{name}: {reason_of(error)}") from None
        if shape != stored["shape"]:
            raise self._damaged(
                f"{name} is stored as {shape}, its metadata says {stored['shape']}"
            )

    def _restore(self, name: str, part: int) -> np.ndarray:
        """One array: of many at once, Orbax prints a traceback for each broken one."""
        like = traverse_util.unflatten_dict({name: np.empty(0)}, sep="/")
        to_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like
        )
        args = ocp.args.PyTreeRestore(like, restore_args=to_numpy, partial_restore=True)
        try:
            with _checkpointer(arrays_handler) as checkpointer:
                tree = checkpointer.restore(self._path / f"arrays_{part}", args)
            return traverse_util.flatten_dict(tree, sep="/")[name]
        # Orbax and TensorStore raise whatever the broken byte led to.
        except Exception as error:
            raise self._damaged(f"{name}: {reason_of(error)}") from None

    def _damaged(self, reason: str) -> DamagedError:
        return _damaged(self._path, reason)


def check_destination(path: StrPath) -> None:
    """Refuses a path that cannot be written to, before any work is done for it.

    Raises:
      FileExistsError: something is there.
      FileNotFoundError: the directory around it does not exist.
      PermissionError: the directory around it cannot be written to.
      OSError: its bucket does not answer.
    """
    path = paths.located(path)
    if paths.is_remote(path):
        with paths.answering(path):
            taken = path.exists() and not _is_unfinished(path)
    else:
        taken = path.exists() or Path(path).is_symlink()
    if taken:
        raise FileExistsError(f"{path} exists: remove it or choose another name.")
    if paths.is_remote(path):  # there are no directories to be missing
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory: create it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} cannot be written to.")


def _is_unfinished(path: AnyPath) -> bool:
    """Whether a directory of a bucket is what a writer that was killed has left."""
    return (
        path.is_dir()
        and all(PART.fullmatch(part.name) for part in path.iterdir())
        and not (path / "metadata" / COMMITTED).exists()
    )


def check_storable(name: str, array: np.ndarray) -> None:
    """Raises ValueError for what would not come back as it is."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: names are letters, digits, '_', '-' and '/'.")
    # Kind V is bfloat16 and its kin, which NumPy does not know by itself.
    if array.size == 0 or array.dtype.kind not in "biufcV":
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}: only arrays of numbers that are "
            "not empty can be stored."
        )


def tool() -> str:
    """Name and version of this program, as files tell who wrote them."""
    try:
        return f"sinder_jax {importlib.metadata.version('sinder_jax')}"
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the sources
        return "sinder_jax"


def reason_of(error: Exception, limit: int = 200) -> str:
    """The first line of an error, short enough to stand inside another one.

    What the system said, if TensorStore wrapped it into its own words.
    """
    code = SYSTEM_ERROR.search(str(error))
    if code:
        return os.strerror(int(code[1]))
    text = str(error).strip() or "no reason given"
    line = text.splitlines()[0]
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return f"{type(error).__name__}: {line}"


# --- Orbax ------------------------------------------------------------------------


def alone() -> ocp.options.MultiprocessingOptions:
    """For a process that waits for no other one: no barrier, and it may write."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}
    )


class _OneByOne(ocp.type_handlers.NumpyHandler):
    async def serialize(self, values, infos, args=None):
        """A task for each array, so that one that fails takes no other one with it.

        On a full disk all fail, and those of one task print tracebacks past the first.
        """
        args = args or [ocp.SaveArgs()] * len(values)
        tasks = []
        for value, info, arg in zip(values, infos, args, strict=True):
            tasks += await super().serialize([value], [info], [arg])
        return tasks


def arrays_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """What writes and reads a part; nobody may change its arrays meanwhile."""
    numpy = _OneByOne(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, numpy),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # or Orbax misses it aloud
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,  # it makes weights 8 % smaller, and writing half as fast
        type_handler_registry=registry,
        **options,
    )


def arrays_args(tree: Mapping[str, Any]) -> ocp.args.PyTreeSave:
    """A nested tree of arrays as `arrays_handler` is to write it."""
    chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    return ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: chunks, tree))


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Orbax logs: its errors come back as exceptions and are told once.

    It also warns that arrays in files of their own are not to be merged.
    """

    def is_kept(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    log = logging.getLogger("absl")
    log.addFilter(is_kept)
    try:
        yield
    finally:
        log.removeFilter(is_kept)


def wait_for_writes() -> None:
    """Waits until Orbax's background threads have ended.

    Orbax reports the first array that fails while other threads still write theirs, so
    files that are removed at once appear again. And a new CheckpointManager removes
    unfinished checkpoints in the background. Orbax gives access to neither.
    """
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with suppress(Exception):  # reported already
                thread.join(JOIN_TIMEOUT)


def _checkpointer(handler: Any) -> ocp.Checkpointer:
    return ocp.Checkpointer(
        handler(multiprocessing_options=alone()), multiprocessing_options=alone()
    )


# --- The header: what is stored, and its own digest ---------------------------------


def entry(array: np.ndarray, sha256: str, *, part: int) -> dict[str, Any]:
    """How the list of arrays describes one."""
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "sha256": sha256,
        "part": part,
    }


def header(
    arrays: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """What the item `metadata` holds; ValueError for metadata that is no JSON.

    Args:
      arrays: by name, `entry`.
      metadata: JSON values.
    """
    found = {
        "format": FORMAT,
        "version": VERSION,
        "arrays": dict(arrays),
        "metadata": dict(metadata),
    }
    return found | {"sha256": _sha256_of(found)}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON values: {error}.") from None


def _sha256_of(found: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in found.items() if key != "sha256"}
    return hashlib.sha256(_json(rest).encode()).hexdigest()


def _read_header(path: AnyPath) -> dict[str, Any]:
    with paths.answering(path):
        exists = path.exists()
    if not exists:
        raise FileNotFoundError(f"{path}: no such checkpoint.")
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file; a checkpoint is a directory, which "
            f"`python -m convert to-jax {path.name} DIR` makes of a PyTorch file."
        )
    if paths.is_remote(path) and _is_unfinished(path):
        raise ValueError(f"{path}: no checkpoint, writing it was cut short.")
    if not (path / "metadata").exists():
        raise ValueError(f"{path}: no checkpoint of {FORMAT}, it holds no metadata.")
    try:
        with _checkpointer(ocp.JsonCheckpointHandler) as checkpointer:
            found = checkpointer.restore(path / "metadata", ocp.args.JsonRestore())
    except Exception as error:  # as in `Reader._restore`
        raise _damaged(path, f"metadata: {reason_of(error)}") from None
    _check_header(path, found)
    return found


def _check_header(path: AnyPath, found: Any) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(
            f"{path}: no checkpoint of {FORMAT}, its metadata is another's."
        )
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: the format's version is {found.get('version')!r}, this program "
            f"reads {VERSION}: use the program that wrote it, or write it again."
        )
    if found.get("sha256") != _sha256_of(found):
        raise _damaged(path, "metadata: it is not what was written")
    arrays, metadata = found.get("arrays"), found.get("metadata")
    if not (isinstance(arrays, dict) and arrays and isinstance(metadata, dict)):
        raise _damaged(path, "metadata: its list of arrays is missing")
    for name, described in arrays.items():
        # Not only damage: a stranger's checkpoint may name files outside it.
        if not (NAME.fullmatch(name) and _is_entry(described)):
            raise _damaged(path, f"metadata: {name!r} is not described as an array")


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"shape", "dtype", "sha256", "part"}
        and isinstance(value["shape"], list)
        and all(type(side) is int and side >= 0 for side in value["shape"])
        and isinstance(value["dtype"], str)
        and type(value["part"]) is int
    )


def _damaged(path: AnyPath, reason: str) -> DamagedError:
    return DamagedError(
        f"{path}: the checkpoint is damaged ({reason}): write it again."
    )
