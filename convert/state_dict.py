"""Tensors by name that may still be in a file, and the errors about such files."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# What a text in a file of weights never exceeds: beyond it a file is refused before it
# is parsed, for Python takes up to 70 times the memory of the text. The giant's header
# has 0.2 MB.
MOST_TEXT = 2 * 2**20


class Spec(NamedTuple):
    """What is known of a tensor before it is read: shape and NumPy's dtype name."""

    shape: tuple[int, ...]
    dtype: str


class StateDict(Mapping[str, np.ndarray]):
    """Tensors by name; each is read, in its stored number format, when asked for.

    Attributes:
      specs: shape and number format of every tensor.
      files: the files they are in.
      metadata: text by name that the file carries (safetensors).
      config: what a `config.json` beside them says, or an empty dict.
      left_out: entries that hold no weights, by name.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], np.ndarray],
        files: Sequence[Path],
        metadata: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        left_out: Sequence[str] = (),
    ):
        self.specs = dict(specs)
        self.files = list(files)
        self.metadata = dict(metadata or {})
        self.config = dict(config or {})
        self.left_out = list(left_out)
        self._read = read

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.specs:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def damaged(path: Path, kind: str, why: str) -> ValueError:
    """The error about a file that cannot be read as what it claims to be."""
    return ValueError(f"{path}: damaged, or no {kind} file ({why}): fetch it again.")


def reason(error: BaseException) -> str:
    """The first sentence of an error, short enough to stand inside another one."""
    text = str(error).strip() or type(error).__name__
    return re.split(r"\. |\n", text)[0][:200].rstrip(".")
