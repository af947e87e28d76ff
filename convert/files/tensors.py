"""Tensors by name that may still be in a file, and the errors about such files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# Largest text in a file of weights, in bytes: a file with more is refused before it is
# parsed, since Python needs up to 70 times the memory. The giant's header has 0.2 MB.
MOST_TEXT = 2 * 2**20

# The number formats of safetensors that NumPy has. Floats of 8 bits are listed by name
# and refused when read.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}


class Spec(NamedTuple):
    """What is known of a tensor before it is read: shape and NumPy's dtype name."""

    shape: tuple[int, ...]
    dtype: str


class StateDict(Mapping[str, np.ndarray]):
    """Tensors by name, each read in its stored number format when it is asked for.

    Attributes:
      specs: shape and number format of every tensor.
      files: the files that hold them.
      metadata: text by name from the file itself.
      contents: JSON objects of the files beside the tensors, by file name.
      left_out: names of entries that hold no weights.
      whole: what torch.load found in a .pth; None for other files.
      nest: names of the entries of `whole` that lead to the tensors.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], np.ndarray],
        files: Sequence[Path],
        metadata: Mapping[str, str] | None = None,
        left_out: Sequence[str] = (),
        whole: Any = None,
        nest: tuple[str, ...] = (),
    ):
        self.specs = dict(specs)
        self.files = list(files)
        self.metadata = dict(metadata or {})
        self.contents: dict[str, dict[str, Any]] = {}
        self.left_out = list(left_out)
        self.whole, self.nest = whole, nest
        self._read = read

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> "StateDict":
        """Tensors in memory; values that are not arrays get their type as dtype."""
        if isinstance(tensors, StateDict):
            return tensors
        specs = {
            key: Spec(
                tuple(getattr(x, "shape", ())),
                x.dtype.name if isinstance(x, np.ndarray) else type(x).__name__,
            )
            for key, x in tensors.items()
        }
        return cls(specs, tensors.__getitem__, [])

    @property
    def config(self) -> dict[str, Any]:
        """The `config.json` beside the tensors, or an empty dict."""
        return self.contents.get("config.json", {})

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.specs:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def damaged(path: Path, kind: str, why: str) -> ValueError:
    """The error about a file that cannot be read as what its name says."""
    return ValueError(f"{path}: damaged, or not a {kind} file ({why}); fetch it again")
