"""The item `metadata` of a checkpoint directory: what it holds, and its own digest.

arrays, JSON values --header--> {"format", "version", "arrays", "metadata", "sha256"}
what a file says --check_header--> the same, or an error in one line
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sinder_jax import param_tree
from sinder_jax.storage.errors import DamagedError
from sinder_jax.storage.paths import AnyPath

FORMAT = "sinder_jax"
VERSION = 2
NAME = re.compile(r"[\w-]+(/[\w-]+)*")  # a dot would be a slash on disk


def entry(name: str, array: np.ndarray, *, part: int) -> dict[str, Any]:
    """What a header says of one array, with its SHA-256.

    Raises:
      ValueError: a name or an array that would not come back unchanged.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: names are letters, digits, '_', '-' and '/'")
    # Kind V is bfloat16 and its kin, which NumPy itself does not know.
    if array.size == 0 or array.dtype.kind not in "biufcV":
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}: only nonempty arrays of numbers "
            "can be stored"
        )
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "sha256": param_tree.digest_of_array(array),
        "part": part,
    }


def header(
    arrays: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole header.

    Args:
      arrays: `entry` of each array by name.
      metadata: JSON values.

    Raises:
      ValueError: metadata that is not JSON.
    """
    found = {
        "format": FORMAT,
        "version": VERSION,
        "arrays": dict(arrays),
        "metadata": dict(metadata),
    }
    return found | {"sha256": _sha256_of(found)}


def check_json(value: Any) -> str:
    """Metadata as JSON text; raises ValueError if it cannot be stored."""
    try:
        return json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON values: {error}") from None


def _sha256_of(found: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in found.items() if key != "sha256"}
    return hashlib.sha256(check_json(rest).encode()).hexdigest()


def check_header(path: AnyPath, found: Any) -> None:
    """Refuses a header that is not exactly as this program wrote it.

    Raises:
      DamagedError: it was changed, or describes something other than arrays.
      ValueError: another program's, or another version's.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a checkpoint of {FORMAT}, another program wrote its metadata"
        )
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: the format's version is {found.get('version')!r}, this program "
            f"reads {VERSION}: use the program that wrote it, or write it again"
        )
    if found.get("sha256") != _sha256_of(found):
        raise damaged(path, "metadata: it is not what was written")
    arrays, metadata = found.get("arrays"), found.get("metadata")
    if not (isinstance(arrays, dict) and arrays and isinstance(metadata, dict)):
        raise damaged(path, "metadata: its list of arrays is missing")
    for name, described in arrays.items():
        # Not only damage: a stranger's checkpoint may name files outside it.
        if not (NAME.fullmatch(name) and _is_entry(described)):
            raise damaged(path, f"metadata: {name!r} is not described as an array")


def _is_entry(value: Any) -> bool:
    kinds = {"shape": list, "dtype": str, "sha256": str, "part": int}
    return (
        isinstance(value, dict)
        and {key: type(each) for key, each in value.items()} == kinds
        and all(type(side) is int and side >= 0 for side in value["shape"])
    )


def damaged(path: AnyPath, reason: str) -> DamagedError:
    """The error for a checkpoint whose bytes are not what was written."""
    return DamagedError(f"{path}: the checkpoint is damaged ({reason}): write it again")
