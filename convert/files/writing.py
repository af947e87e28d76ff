"""Writes PyTorch files tensor by tensor: .safetensors, .pth, Hugging Face directories.

    specs, (name, tensor), ... --write_tensors--> FILE, whole or not at all, FILE.sha256

No file needs memory for all its tensors: each is written to its place when it comes, in
any order. The same tensors and metadata give the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import sha256, writing_pth, writing_safetensors
from convert.files.reading_pth import import_torch
from convert.files.tensors import Spec, StateDict
from convert.files.writing_safetensors import Metadata, Tensors
from sinder_jax.storage import array_store, files
from sinder_jax.storage.errors import reason_of
from sinder_jax.storage.paths import StrPath

WRITERS = {
    ".pth": writing_pth.write,
    ".pt": writing_pth.write,
    ".bin": writing_pth.write,
    ".safetensors": writing_safetensors.write,
}


def write_state_dict(
    path: StrPath,
    state_dict: Mapping[str, np.ndarray],
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors by name to `path`, and its SHA-256 to `path`.sha256.

    The file appears whole or not at all; `sha256sum -c` checks it.

    Args:
      path: `.pth`, `.pt` or `.safetensors`; its directory must exist.
      state_dict: arrays by PyTorch name.
      overwrite: True replaces an existing file.
      metadata: text by name to store in the file.

    Raises:
      ValueError: an unknown suffix.
      FileExistsError: `path` or its `.sha256` exists, and `overwrite` is False.
      FileNotFoundError, PermissionError: its directory is missing or closed.
      OSError: writing failed, for example on a full disk.
      ImportError: `.pth` without torch.
    """
    tensors = ((key, np.asarray(array)) for key, array in state_dict.items())
    specs = StateDict.of(state_dict).specs
    write_tensors(path, specs, tensors, lambda: metadata or {}, overwrite)


def write_tensors(
    path: StrPath,
    specs: Mapping[str, Spec],
    tensors: Tensors,
    metadata: Metadata = dict,
    overwrite: bool = False,
) -> None:
    """Writes tensors that come one by one; otherwise as `write_state_dict`.

    Args:
      path: as for `write_state_dict`.
      specs: shape and number format of every tensor, in the order of a `.pth`.
      tensors: names and arrays, each once, in any order.
      metadata: called before the first tensor and after the last; the second answer is
        stored, and its texts must be as long as those of the first.
      overwrite: as for `write_state_dict`.

    Raises:
      As `write_state_dict`.
    """
    path = Path(path)
    with file(path, overwrite) as partial:
        WRITERS[path.suffix](partial, specs, tensors, metadata)


@contextmanager
def file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path to write to; `path` and its `.sha256` appear at the end.

    Arguments and errors are those of `write_state_dict`.
    """
    check_destination(path, overwrite)
    side = sha256.side_file(path)
    with files.replacing(path) as partial:
        with _naming(path):
            yield partial
        digest = sha256.of_file(partial)
        side.unlink(missing_ok=True)  # never beside a file that it does not describe
    files.write(side, sha256.line(path, digest))


@contextmanager
def directory(path: StrPath) -> Iterator[Path]:
    """Yields a folder to fill, which appears with the SHA-256 of all files in it.

    Args:
      path: a directory that does not exist, in one that does.

    Raises:
      FileExistsError, FileNotFoundError, PermissionError: `path` cannot be made.
      OSError: writing failed.
    """
    path = Path(path)
    array_store.check_destination(path)
    with files.replacing(path) as partial:
        partial.mkdir()
        with _naming(path):
            yield partial
        order = {sha256.MODEL: 0}
        made = sorted(partial.iterdir(), key=lambda x: (order.get(x.name, 1), x.name))
        sha256.side_file(partial).write_bytes(b"".join(map(sha256.line, made)))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the destination in torch's errors, among them that of a full disk."""
    try:
        yield
    except RuntimeError as error:
        # It notices that bytes are missing after the system's error, which counts.
        reason = error.__context__ or error
        raise OSError(f"{path} cannot be written: {reason_of(reason)}") from None


def write_directory(
    path: StrPath,
    contents: Mapping[str, Any],
    specs: Mapping[str, Spec],
    tensors: Tensors,
    metadata: Metadata = dict,
) -> None:
    """Writes a directory that transformers' `from_pretrained` loads.

    It holds model.safetensors, the JSON files, and model.safetensors.sha256 for all.

    Args:
      path: a directory that does not exist, in one that does.
      contents: JSON objects by file name, see `hugging_face.contents`.
      specs: as for `write_tensors`.
      tensors: as for `write_tensors`.
      metadata: as for `write_tensors`.

    Raises:
      As `directory`.
    """
    with directory(path) as partial:
        writing_safetensors.write(partial / sha256.MODEL, specs, tensors, metadata)
        for name, value in contents.items():
            (partial / name).write_text(json.dumps(value, indent=2) + "\n")


def check_destination(path: StrPath, overwrite: bool = False) -> None:
    """Refuses a file that cannot be written, before any work is done for it.

    Raises:
      As `write_state_dict`.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; use {', '.join(WRITERS)}"
        )
    if path.suffix != ".safetensors":
        import_torch(path)
    for file in (path, sha256.side_file(path)):
        if not (overwrite and file.is_file()):
            array_store.check_destination(file)
