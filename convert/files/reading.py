"""Reads .safetensors, shards, .pth and Hugging Face directories tensor by tensor.

    file or directory --open_state_dict--> StateDict {name: array, read when asked for}

Nothing that a file claims is trusted: no code of a pickle runs, no memory is allocated
for which the file has no bytes, no name leads out of its directory. torch is imported
for `.pth`, `.pt` and `.bin` only, inside the functions that need it.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from convert.files import strangers
from convert.files.reading_pth import open_pth
from convert.files.strangers import INDEX, WEIGHTS
from convert.files.tensors import DTYPES, MOST_TEXT, Spec, StateDict, damaged
from sinder_jax.storage import paths
from sinder_jax.storage.errors import reading, reason_of
from sinder_jax.storage.paths import StrPath

FORMATS = (".pth", ".pt", ".bin", ".safetensors")
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


def open_state_dict(path: StrPath) -> StateDict:
    """Opens PyTorch files; tensors keep their number formats.

    Args:
      path: `.safetensors`; an index of shards (`.safetensors.index.json`); `.pth`,
        `.pt` or `.bin`, read with `weights_only=True`; or a Hugging Face directory.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: a directory without weights, an unknown suffix, a damaged file, one
        that would run code (none runs) or fill the memory, or one that holds anything
        but tensors by name; one line.
      ImportError: `.pth` without torch.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    strangers.check(path, text=path.name.endswith(INDEX))
    if not path.name.endswith((*FORMATS, INDEX)):
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; use {', '.join(FORMATS)}"
        )
    if path.name.endswith(INDEX):
        found = _open_shards(path)
    elif path.suffix == ".safetensors":
        found = _open_safetensors(path)
    else:
        found = open_pth(path)
    if path.name in WEIGHTS:  # what stands beside them describes them
        found.contents = {
            name: read_json(path.parent / name)
            for name in (CONFIG, PREPROCESSOR)
            if (path.parent / name).exists()
        }
    return found


def is_torch_source(path: StrPath) -> bool:
    """True for a file or a Hugging Face directory: `open_state_dict` reads it."""
    path = paths.as_path(path)
    return not path.is_dir() or any((path / name).exists() for name in WEIGHTS)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of modest size.

    Raises:
      ValueError: not such an object, or a name occurs twice in it.
    """
    strangers.check(path, text=True)
    if path.stat().st_size > MOST_TEXT:
        raise damaged(path, "JSON", f"it has more than {MOST_TEXT} bytes")
    try:
        return _parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, "JSON", reason_of(error)) from None


def _parse(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice[:80]!r} occurs twice")
        return found

    value = json.loads(text, object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError(f"got a {type(value).__name__}, expected an object")
    return value


def _open_directory(path: Path) -> StateDict:
    for name in WEIGHTS:
        if (path / name).exists():
            found = open_state_dict(path / name)
            if (path / CONFIG).exists():
                found.files.append(path / CONFIG)
            return found
    raise ValueError(f"{path}: {strangers.describe(path, FORMATS)}")


# --- safetensors ------------------------------------------------------------------


def _open_safetensors(path: Path) -> StateDict:
    header, start = _header(path)
    metadata = header.pop("__metadata__", {})
    dtypes = {key: DTYPES.get(entry["dtype"]) for key, entry in header.items()}
    specs = {
        key: Spec(tuple(entry["shape"]), getattr(dtypes[key], "name", entry["dtype"]))
        for key, entry in header.items()
    }
    size = path.stat().st_size

    def read(key: str) -> np.ndarray:
        shape, name = specs[key]
        if dtypes[key] is None:
            raise ValueError(f"{path}: {key} is {name}, which NumPy does not have")
        if path.stat().st_size != size:
            raise damaged(path, "safetensors", "it changed while it was read")
        offset = start + header[key]["data_offsets"][0]
        flat = np.fromfile(path, dtypes[key], math.prod(shape), offset=offset)
        return flat.reshape(shape)

    return StateDict(specs, read, [path], metadata)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, checked by the safetensors library, and the offset of the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 0 < length <= min(MOST_TEXT, size - 8):
            raise damaged(
                path, "safetensors", f"its header has {length} of {size} bytes"
            )
        text = file.read(length)

    def unreadable(error: Exception) -> ValueError:
        return damaged(path, "safetensors", reason_of(error))

    # AttributeError: for a number format that NumPy lacks.
    broken = (safetensors.SafetensorError, AttributeError, ValueError, RecursionError)
    with reading(path, broken, unreadable):
        header = _parse(text)
        # The library checks that offsets meet without gap or overlap, that they agree
        # with the shapes, and that the file ends with the last of them.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    return header, 8 + length


def _open_shards(path: Path) -> StateDict:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "safetensors index", "it holds no weight_map")
    shards = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{path}: got {name[:80]!r}, expected a .safetensors file beside it"
            )
        shards[name] = open_state_dict(path.parent / name)
    stored = [(key, name) for name, shard in shards.items() for key in shard]
    misplaced = set(stored) ^ set(weight_map.items())
    if misplaced:
        key, name = min(misplaced)
        raise ValueError(
            f"{path}: does not match the shards: {key[:80]!r} in {name} is listed or "
            f"stored, not both ({len(misplaced)} such tensors); fetch all of them again"
        )
    specs = {key: shards[name].specs[key] for key, name in weight_map.items()}
    files = [path, *(path.parent / name for name in shards)]
    metadata = next(iter(shards.values())).metadata
    return StateDict(specs, lambda key: shards[weight_map[key]][key], files, metadata)
