"""Writes .safetensors files tensor by tensor, with the bytes of the library."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.tensors import DTYPES, Spec

Tensors = Iterable[tuple[str, np.ndarray]]
# Called before the first tensor and again after the last, when digests are known; both
# answers have texts of the same lengths.
Metadata = Callable[[], Mapping[str, str]]
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


def write(
    path: Path, specs: Mapping[str, Spec], tensors: Tensors, metadata: Metadata
) -> None:
    """Writes a new file; arguments as for `writing.write_tensors`."""
    header, offsets, size = _layout(specs, metadata())
    with path.open("xb") as file:
        file.write(header)
        file.truncate(len(header) + size)
        for key, array in tensors:
            file.seek(len(header) + offsets[key])
            write_array(file, array, specs[key])
        final, _, _ = _layout(specs, metadata())
        assert len(final) == len(header), "metadata changed its length"
        file.seek(0)
        file.write(final)


def _layout(
    specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Header, offset of each tensor and size of all data.

    Like the safetensors library, puts larger number formats first, then sorts by name,
    so that all tensors are aligned.
    """
    # Hugging Face's loaders look for the entry "format".
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offsets, end = {}, 0
    for key in sorted(
        specs, key=lambda key: (-np.dtype(specs[key].dtype).itemsize, key)
    ):
        shape, dtype = specs[key]
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        start, end = end, end + size
        offsets[key] = start
        header[key] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def write_array(file: Any, array: np.ndarray, spec: Spec) -> None:
    """Writes the bytes of an array that must be as announced."""
    assert Spec(array.shape, array.dtype.name) == spec, f"not as announced: {spec}"
    file.write(bytes_of(array))


def bytes_of(array: np.ndarray) -> memoryview:
    """An array's bytes in C order."""
    # Not ascontiguousarray, which makes a vector of a single number.
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data
