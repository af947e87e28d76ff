"""Numbers that are computed once, kept as .npz files, and found again.

    Step: kind, what it depends on, how to compute it
    Step --Cache--> arrays: from DIR/KIND-DIGEST.npz, or computed now and kept there

The digest covers everything a step depends on: the model's digest, the bytes of the
photograph, and the options that change it. Another option computes no more than it
must.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sinder_jax.storage import files

Arrays = dict[str, np.ndarray]
FORMAT = 1  # of the files; after a change everything is computed anew


class Step(NamedTuple):
    """One thing to compute, or to find again.

    Attributes:
      label: what the user reads.
      kind: what sort of numbers it computes.
      key: everything it depends on; JSON values.
      compute: makes the arrays.
    """

    label: str
    kind: str
    key: dict[str, Any]
    compute: Callable[[], Arrays]


class Cache:
    """Arrays of steps, in memory and on a disk.

    Args:
      folder: made if it does not exist.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[Path, Arrays] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, step: Step) -> Path:
        """Returns the file that keeps the step's arrays."""
        key = {"format": FORMAT, "kind": step.kind, **step.key}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{step.kind}-{digest[:16]}.npz"

    def has(self, step: Step) -> bool:
        """Returns True if the step's arrays are there, whole."""
        path = self.path(step)
        if path not in self._known and (kept := read_arrays(path)) is not None:
            self._known[path] = kept
        return path in self._known

    def __call__(self, step: Step) -> Arrays:
        """Returns the step's arrays; computes and keeps them if they are not there."""
        path = self.path(step)
        if not self.has(step):
            arrays = {name: np.asarray(x) for name, x in step.compute().items()}
            write_arrays(path, arrays)
            self._known[path] = arrays
        return self._known[path]


def read_arrays(path: Path) -> Arrays | None:
    """Reads what `write_arrays` wrote; None if the file is missing or damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # cut short by a crash of the machine: computed again


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes a .npz, whole or not at all."""
    with files.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
