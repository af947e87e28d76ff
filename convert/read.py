"""PyTorch files, read tensor by tensor: .safetensors, .pth, Hugging Face directories.

    file or directory --open_state_dict--> StateDict {name: array, read when asked for}

Nothing that a file says is believed: no code of a pickle runs, no size is allocated
that the file does not have, no name leads out of its directory. torch is imported for
`.pth`, `.pt` and `.bin` only, inside the functions that need it.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from convert.state_dict import MOST_TEXT, Spec, StateDict, damaged, reason
from convert.torch_file import open_torch_file
from sinder_jax.storage import paths

StrPath = str | os.PathLike[str]
TORCH = (".pth", ".pt", ".bin")
FORMATS = (*TORCH, ".safetensors")
INDEX = ".safetensors.index.json"
CONFIG = "config.json"
# Weights of a Hugging Face directory, in the order in which transformers looks.
WEIGHTS = ("model.safetensors", f"model{INDEX}", "pytorch_model.bin")


# The number formats of safetensors; floats of 8 bits are told by name, not read.
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


def read_state_dict(path: StrPath) -> dict[str, np.ndarray]:
    """All tensors of `open_state_dict` at once.

    Raises:
      As `open_state_dict`.
    """
    return dict(open_state_dict(path))


def open_state_dict(path: StrPath) -> StateDict:
    """The tensors of a PyTorch file by name, in their stored number formats.

    Args:
      path: `.safetensors`; an index of several (`.safetensors.index.json`); `.pth`,
        `.pt` or `.bin`, read with `weights_only=True`; or a Hugging Face directory.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: a directory without weights, an unknown suffix, a damaged file, one
        that would run code (it does not) or fill the memory, or one that holds anything
        but tensors by name; one line.
      ImportError: `.pth` without torch.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.name.endswith((*FORMATS, INDEX)):
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; {', '.join(FORMATS)} are allowed."
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.name.endswith(INDEX):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return open_torch_file(path)


def is_torch_source(path: StrPath) -> bool:
    """Whether `open_state_dict` is what reads this path: no checkpoint of ours."""
    path = paths.as_path(path)
    return not path.is_dir() or any((path / name).exists() for name in WEIGHTS)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(
    files: Sequence[Path], known: Mapping[Path, str] | None = None
) -> str:
    """SHA-256 of one file, or of the lines that `sha256sum` prints of several.

    Args:
      files: at least one.
      known: those that have been computed.
    """
    known = known or {}
    digests = [known.get(file) or sha256_of_file(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = (f"{x}  {file.name}\n" for x, file in zip(digests, files, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- The side file, FILE.sha256 ----------------------------------------------------


def side_file(path: Path) -> Path:
    """FILE.sha256 of a file, that of the weights for a Hugging Face directory."""
    if path.is_dir():
        path = path / WEIGHTS[0]
    return path.with_name(f"{path.name}.sha256")


def check_side_file(path: Path) -> dict[Path, str]:
    """Holds a file or directory against its `.sha256`.

    Returns:
      The files that were found as they should be, with their SHA-256; none where there
      is no such side file.

    Raises:
      ValueError: a file is missing or has other bytes than when it was written, or the
        side file is no list of digests.
    """
    side = side_file(path)
    if not side.is_file():
        return {}
    verified = {}
    for line in side.read_text(errors="replace").splitlines():
        sha256, _, name = line.partition("  ")
        file = side.parent / name
        if len(sha256) != 64 or not name or file.name != name:
            raise ValueError(f"{side}: damaged, it is no list of SHA-256 digests.")
        if not file.is_file():
            raise ValueError(f"{file}: missing, {side} lists it.")
        if sha256_of_file(file) != sha256:
            raise ValueError(
                f"{file}: damaged, its bytes are not those that {side} tells of: fetch "
                "or convert it again."
            )
        verified[file] = sha256
    return verified


# --- Hugging Face directories ------------------------------------------------------


def _open_directory(path: Path) -> StateDict:
    for name in WEIGHTS:
        if (path / name).exists():
            found = open_state_dict(path / name)
            config = path / CONFIG
            if config.exists():
                found.config = read_json(config)
                found.files.append(config)
            return found
    raise ValueError(
        f"{path} is a directory; what is read is a file, {', '.join(FORMATS)}, or a "
        f"directory with {' or '.join(WEIGHTS)}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of modest size.

    Raises:
      ValueError: it is none.
    """
    if path.stat().st_size > MOST_TEXT:
        raise damaged(path, "JSON", f"it has more than {MOST_TEXT} bytes")
    try:
        return _parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, "JSON", reason(error)) from None


def _parse(text: bytes) -> dict[str, Any]:
    """A JSON object in which no name stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice[:80]!r} stands there twice")
        return found

    value = json.loads(text, object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} in place of an object")
    return value


# --- safetensors ------------------------------------------------------------------


def _open_safetensors(path: Path) -> StateDict:
    header, start = _header(path)
    metadata = header.pop("__metadata__", {})
    specs, offsets = {}, {}
    for key, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        specs[key] = Spec(
            tuple(entry["shape"]), dtype.name if dtype else entry["dtype"]
        )
        offsets[key] = start + entry["data_offsets"][0]
    size = path.stat().st_size

    def read(key: str) -> np.ndarray:
        shape, name = specs[key]
        try:
            dtype = np.dtype(name)
        except TypeError:
            raise ValueError(f"{path}: {key} is {name}, which is not read.") from None
        count = int(np.prod(shape, dtype=np.int64))
        if path.stat().st_size != size:
            raise damaged(path, "safetensors", "it changed while it was read")
        return np.fromfile(path, dtype, count, offset=offsets[key]).reshape(shape)

    return StateDict(specs, read, [path], metadata)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The list of tensors, checked by the safetensors library, and where data begin."""
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        size = path.stat().st_size
        if not 0 < length <= min(MOST_TEXT, size - 8):
            raise damaged(
                path, "safetensors", f"its header has {length} of {size} bytes"
            )
        text = file.read(length)
    try:
        header = _parse(text)
        # The library checks that offsets meet without gap or overlap, that they have
        # the size of their shapes and that the file ends with the last of them.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except Exception as error:  # SafetensorError, or of a format NumPy has no name for
        raise damaged(path, "safetensors", reason(error)) from None
    return header, 8 + length


def _open_shards(path: Path) -> StateDict:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "index of safetensors", "it holds no weight_map")
    for name in set(map(str, weight_map.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{path}: names {name[:80]!r}, which is no .safetensors file beside it."
            )
        if not (path.parent / name).is_file():
            raise FileNotFoundError(
                f"{path.parent / name}: no such file, {path} names it."
            )
    shards = {
        name: _open_safetensors(path.parent / name)
        for name in sorted(set(weight_map.values()))
    }
    stored = [(key, name) for name, shard in shards.items() for key in shard]
    misplaced = set(stored) ^ set(weight_map.items())
    if misplaced:
        key, name = min(misplaced)
        raise ValueError(
            f"{path}: does not tell where tensors are: {key[:80]!r} in {name} is "
            f"listed or stored, not both ({len(misplaced)} such); fetch all again."
        )
    specs = {key: shards[name].specs[key] for key, name in weight_map.items()}
    files = [path, *(path.parent / name for name in shards)]
    metadata = next(iter(shards.values())).metadata
    return StateDict(specs, lambda key: shards[weight_map[key]][key], files, metadata)
