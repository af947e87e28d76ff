"""Patches as files, which is how repaired weights get shared.

    Patch, metadata --save--> one small .safetensors file --load--> Patch, metadata

A digest of all its content is in the file: no damaged one is taken for a patch.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from sinder_jax import checkpoint, param_tree
from sinder_jax.delta import Patch, check
from sinder_jax.storage import array_store
from sinder_jax.vit import ViTConfig

FORMAT = "sinder_jax patch"
VERSION = "1"
MAX_BYTES = 64 * 2**20  # the giant's patch has 1 MB
HEADER = ("format", "version", "base", "config", "digest")
StrPath = str | os.PathLike[str]


def save(
    path: StrPath, patch: Patch, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a patch as one .safetensors file, which appears whole or not at all.

    The same patch and metadata give the same bytes.

    Args:
      path: a file that does not exist, in a directory that does.
      patch: the patch.
      metadata: text to keep beside it, under names other than `HEADER`; "writer" is
        this program unless given.

    Raises:
      ValueError: a patch that is none, or metadata that cannot be kept.
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: the directory around it is missing or closed.
      OSError: writing failed, for example on a full disk.
    """
    path = Path(path)
    checkpoint.check_destination(path)
    check(patch)
    header = {"writer": array_store.tool()} | dict(metadata or {})
    if taken := sorted(header.keys() & set(HEADER)):
        raise ValueError(f"metadata must not be named {', '.join(taken)}.")
    if not all(isinstance(text, str) for text in header.values()):
        raise ValueError("metadata must be text.")
    config = json.dumps(patch.config.as_dict())
    header |= {"format": FORMAT, "version": VERSION, "base": patch.base}
    header |= {"config": config}
    tensors = {
        f"{part}/{name}": np.ascontiguousarray(array)
        for part in ("eps", "probe")
        for name, array in getattr(patch, part).items()
    }
    header["digest"] = _content_digest(tensors, header)
    _write_whole(path, _sorted_header(safetensors.numpy.save(tensors, header)))


def load(path: StrPath) -> tuple[Patch, dict[str, str]]:
    """Reads what `save` wrote.

    Returns:
      The patch, and the metadata given to `save`, with "writer".

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: it is no patch, or it is damaged; the message is one line.
    """
    path = Path(path)
    tensors, header = _read(path)
    if header.get("digest") != _content_digest(tensors, header):
        raise _damaged(path, "its content does not have its digest")
    parts: dict[str, dict[str, np.ndarray]] = {"eps": {}, "probe": {}}
    try:
        for key, array in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = array
        config = ViTConfig(**json.loads(header["config"]))
        patch = Patch(config=config, base=header["base"], **parts)
        check(patch)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(
            f"{path}: no patch of {FORMAT.split()[0]} ({reason})"
        ) from None
    return patch, {name: text for name, text in header.items() if name not in HEADER}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a file that says it is a patch."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if not path.is_file():
        raise ValueError(f"{path} is no file; a patch is a .safetensors file.")
    if path.stat().st_size > MAX_BYTES:
        size = path.stat().st_size / 2**20
        raise ValueError(
            f"{path}: no patch, it has {size:,.0f} MiB and a patch at most "
            f"{MAX_BYTES // 2**20}."
        )
    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            keys = file.keys() if header.get("format") == FORMAT else []
            tensors = {key: file.get_tensor(key) for key in keys}
    # SafetensorError, and AttributeError for a format that NumPy has no name for.
    except Exception as error:
        raise _damaged(path, str(error).splitlines()[0][:200]) from None
    _check_header(path, header)
    return tensors, header


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: no patch; its format is {header.get('format')!r}, not {FORMAT!r}."
        )
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: the format's version is {header.get('version')!r}, this program "
            f"reads {VERSION}: use the program that wrote it."
        )


def _content_digest(
    tensors: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> str:
    """SHA-256 of everything in a patch file but itself, whatever its order there."""
    lines = sorted([name, text] for name, text in header.items() if name != "digest")
    arrays = sorted(
        [name, str(array.dtype), list(array.shape), param_tree.digest_of_array(array)]
        for name, array in tensors.items()
    )
    return hashlib.sha256(json.dumps([lines, arrays]).encode()).hexdigest()


def _sorted_header(content: bytes) -> bytes:
    """The same file with one order of its metadata, which safetensors draws anew."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + content[end:]


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: no patch, or a damaged one ({reason}): fetch it again.")
