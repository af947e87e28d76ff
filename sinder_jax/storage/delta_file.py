"""Deltas as files, which is how repaired weights get shared.

    Delta, provenance --save--> small .safetensors file --load--> Delta, provenance

The file holds a digest of all its content, so that a damaged file is never loaded. Its
format tag, "sinder_jax patch", dates from when a delta was called a patch.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from sinder_jax import param_tree
from sinder_jax.delta import Delta, check
from sinder_jax.storage import array_store, errors, files
from sinder_jax.storage.paths import StrPath
from sinder_jax.vit import ViTConfig

FORMAT = "sinder_jax patch"
VERSION = "1"
# AttributeError: for a format that NumPy has no name for.
BROKEN = (safetensors.SafetensorError, AttributeError, ValueError, TypeError)
MAX_BYTES = 64 * 2**20  # the giant's delta has 1 MB


def save(
    path: StrPath, delta: Delta, provenance: Mapping[str, Any] | None = None
) -> None:
    """Writes a delta as one .safetensors file, which appears whole or not at all.

    The same delta and provenance give the same bytes.

    Args:
      path: a file that does not exist, in a directory that does.
      delta: the delta.
      provenance: of the base, see `model.Model`.

    Raises:
      ValueError: an invalid delta.
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: its directory is missing or not writable.
      OSError: writing failed, for example on a full disk.
    """
    array_store.check_destination(path)
    check(delta)
    header = {
        "writer": array_store.tool(),
        "provenance": json.dumps(dict(provenance or {})),
        "format": FORMAT,
        "version": VERSION,
        "base": delta.base,
        "config": json.dumps(delta.config.as_dict()),
    }
    tensors = {
        f"{part}/{name}": np.ascontiguousarray(array)
        for part in ("eps", "probe")
        for name, array in getattr(delta, part).items()
    }
    header["digest"] = _content_digest(tensors, header)
    files.write(path, _sorted_header(safetensors.numpy.save(tensors, header)))


def load(path: StrPath) -> tuple[Delta, dict[str, Any]]:
    """Reads what `save` wrote.

    Returns:
      The delta, and {"writer": the program that wrote it, "provenance": of the base}.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: not a delta, or damaged; one line.
    """
    path = Path(path)
    tensors, header = _read(path)
    if header.get("digest") != _content_digest(tensors, header):
        raise _damaged(path, "its content does not match its digest")
    parts: dict[str, dict[str, np.ndarray]] = {"eps": {}, "probe": {}}
    try:
        for key, array in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = array
        config = ViTConfig(**json.loads(header["config"]))
        delta = Delta(config=config, base=header["base"], **parts)
        check(delta)
        provenance = dict(json.loads(header.get("provenance", "{}")))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = errors.reason_of(error)
        raise ValueError(f"{path}: not a sinder_jax delta ({reason})") from None
    writer = header.get("writer", "not known")
    return delta, {"writer": writer, "provenance": provenance}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a file whose format tag is that of a delta."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; a delta is a .safetensors file")
    if path.stat().st_size > MAX_BYTES:
        size = path.stat().st_size / 2**20
        raise ValueError(
            f"{path}: not a delta, it has {size:,.0f} MiB and a delta at most "
            f"{MAX_BYTES // 2**20}"
        )
    with errors.reading(
        path, BROKEN, lambda error: _damaged(path, errors.reason_of(error))
    ):
        with safetensors.safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            keys = file.keys() if header.get("format") == FORMAT else []
            tensors = {key: file.get_tensor(key) for key in keys}
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a delta; its format is {header.get('format')!r}, not "
            f"{FORMAT!r}"
        )
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: the format's version is {header.get('version')!r}, this program "
            f"reads {VERSION}: use the program that wrote it"
        )
    return tensors, header


def _content_digest(
    tensors: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> str:
    """SHA-256 of everything in the file but the digest itself, in sorted order."""
    lines = sorted([name, text] for name, text in header.items() if name != "digest")
    arrays = sorted(
        [name, str(array.dtype), list(array.shape), param_tree.digest_of_array(array)]
        for name, array in tensors.items()
    )
    return hashlib.sha256(json.dumps([lines, arrays]).encode()).hexdigest()


def _sorted_header(content: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes it in random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + content[end:]


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: not a delta, or damaged ({reason}): fetch it again")
