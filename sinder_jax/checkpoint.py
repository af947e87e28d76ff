"""Models and other trees of arrays as Orbax directories, checked on both ways.

    config, params --save--> DIR (an Orbax composite) --load--> config, params
    tree, metadata --save_tree--> DIR/arrays + DIR/metadata --load_tree--> the same

A directory appears whole or not at all. Its metadata lists the shape and number format
of every array, so that a file that lost a part is refused instead of half read.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from sinder_jax import vit

FORMAT = "sinder_jax"
VERSION = 1
Tree = dict[str, Any]
StrPath = str | os.PathLike[str]


# --- Nested trees and flat names --------------------------------------------------


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": x}}` as `{"a/b": x}`."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """`{"a/b": x}` as `{"a": {"b": x}}`: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


# --- A model ----------------------------------------------------------------------


def save(path: StrPath, config: vit.ViTConfig, params: Mapping[str, Any]) -> None:
    """Writes a model as the checkpoint directory `path`.

    Args:
      path: a directory that does not exist, in one that does.
      config: the architecture.
      params: float32 arrays, of NumPy or JAX, in the layout of `vit.param_shapes`.

    Raises:
      ValueError: params do not fit the config, or are not finite float32 numbers.
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: the directory around it is missing or closed.
    """
    check_destination(path)
    check_params(config, params)
    save_tree(path, params, {"config": dataclasses.asdict(config)})


def load(path: StrPath) -> tuple[vit.ViTConfig, Tree]:
    """Reads what `save` wrote.

    Returns:
      The architecture and its params, as float32 NumPy arrays.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: it is not a checkpoint of a model, is damaged, or does not fit its own
        config; the message is one line.
    """
    params, metadata = load_tree(path)
    try:
        config = vit.ViTConfig(**metadata["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no checkpoint of a model ({_reason(error)})."
        ) from None
    try:
        check_params(config, params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config, params


def check_params(config: vit.ViTConfig, params: Mapping[str, Any]) -> None:
    """Refuses params that are not the finite float32 arrays of this architecture.

    Raises:
      ValueError: names every missing, surplus and misshapen path or, where the shapes
        fit, every array that is not float32 or holds NaN or infinity.
    """
    vit.check_params(config, params)
    flat = flatten(params)
    wrong = [
        f"{path} is {array.dtype}, not float32"
        for path, array in flat.items()
        if array.dtype != np.float32
    ]
    wrong += [
        f"{path} holds NaN or infinity"
        for path, array in flat.items()
        if array.dtype == np.float32 and not vit.is_finite(np.asarray(array))
    ]
    if wrong:
        raise ValueError(
            "params are not finite float32 numbers: " + "; ".join(wrong) + "."
        )


# --- Any tree ---------------------------------------------------------------------


def save_tree(
    path: StrPath, tree: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Writes nested dicts of arrays and what is to be known about them.

    It waits for no other process: of many hosts, call it on process 0 alone.

    Args:
      path: a directory that does not exist, in one that does.
      tree: nested dicts with strings as keys and arrays or numbers as leaves, of any
        number format; empty dicts are not kept, empty arrays are refused.
      metadata: JSON values.

    Raises:
      ValueError: a leaf that cannot be stored, or metadata that is no JSON.
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: the directory around it is missing or closed.
      OSError: writing failed, for example on a full disk.
      RuntimeError: on another process than 0, whose arrays Orbax would leave out.
    """
    check_destination(path)
    if jax.process_index():
        raise RuntimeError(f"process {jax.process_index()} must leave saving to 0.")
    path = Path(path).absolute()
    flat = _storable(tree)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "arrays": {
            name: {"shape": list(array.shape), "dtype": array.dtype.name}
            for name, array in flat.items()
        },
        "metadata": dict(metadata),
    }
    try:
        json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON values: {error}.") from None
    items = ocp.args.Composite(
        arrays=ocp.args.PyTreeSave(unflatten(flat)), metadata=ocp.args.JsonSave(header)
    )
    # A directory beside the destination: renaming is atomic there, and whatever a
    # failure leaves goes with it.
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", dir=path.parent
    ) as staging:
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(Path(staging, path.name), items)
        except (
            Exception
        ) as error:  # TensorStore has no OSError: its own are ValueErrors
            raise OSError(f"{path}: cannot be written ({_reason(error)}).") from None
        os.rename(Path(staging, path.name), path)


def load_tree(path: StrPath) -> tuple[Tree, dict[str, Any]]:
    """Reads what `save_tree` wrote.

    Returns:
      (tree, metadata): nested dicts of NumPy arrays in the stored number formats, and
      the JSON values.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: it is not a checkpoint, or it is damaged; the message is one line.
    """
    path = Path(path).absolute()
    header = _read_header(path)
    flat = {}
    with _checkpointer() as checkpointer:
        for name, stored in header["arrays"].items():
            array = _read_array(checkpointer, path, name)
            found = {"shape": list(array.shape), "dtype": array.dtype.name}
            if found != stored:
                raise _damaged(path, f"{name} is {found}, its metadata says {stored}")
            flat[name] = array
    return unflatten(flat), header["metadata"]


def check_destination(path: StrPath) -> None:
    """Refuses a path that cannot be written to, before any work is done for it.

    Raises:
      FileExistsError: something is there.
      FileNotFoundError: the directory around it does not exist.
      PermissionError: the directory around it cannot be written to.
    """
    path = Path(path).absolute()
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: remove it or choose another name.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory: create it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} cannot be written to.")


def _checkpointer() -> ocp.Checkpointer:
    """A composite checkpointer of this process alone: no barrier, and it may write."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}
    )
    handler = ocp.CompositeCheckpointHandler(
        arrays=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        metadata=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _storable(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flat names and arrays; of other leaves Orbax refuses some and changes others."""
    for keys in traverse_util.flatten_dict(dict(tree)):
        if not all(isinstance(key, str) and key and "/" not in key for key in keys):
            raise ValueError(f"{keys}: names must be text without a slash.")
    flat = {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}
    if not flat:
        raise ValueError("the tree holds no array.")
    for name, array in flat.items():
        # Kind V is bfloat16 and its kin, which NumPy does not know by itself.
        if array.size == 0 or array.dtype.kind not in "biufcV":
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}: only arrays of numbers that "
                "are not empty can be stored."
            )
    return flat


def _read_array(checkpointer: ocp.Checkpointer, path: Path, name: str) -> np.ndarray:
    """One array: of many at once, Orbax prints a traceback for each broken one."""
    like = unflatten({name: np.empty(0)})
    to_numpy = unflatten({name: ocp.RestoreArgs(restore_type=np.ndarray)})
    restore = ocp.args.PyTreeRestore(like, restore_args=to_numpy, partial_restore=True)
    try:
        items = checkpointer.restore(path, ocp.args.Composite(arrays=restore))
        return flatten(items["arrays"])[name]
    # Orbax and TensorStore raise whatever the broken byte led to.
    except Exception as error:
        raise _damaged(path, f"{name}: {_reason(error)}") from None


def _read_header(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint.")
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file; a checkpoint is a directory, which "
            f"`python -m convert to-jax {path.name} DIR` makes of a PyTorch file."
        )
    if not (path / "metadata").exists():
        raise ValueError(f"{path}: no checkpoint of {FORMAT}, it holds no metadata.")
    try:
        with _checkpointer() as checkpointer:
            stored = ocp.args.Composite(metadata=ocp.args.JsonRestore())
            header = checkpointer.restore(path, stored)["metadata"]
    except Exception as error:  # as in `_read_array`
        raise _damaged(path, f"metadata: {_reason(error)}") from None
    _check_header(path, header)
    return header


def _check_header(path: Path, header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: no checkpoint of {FORMAT}, its metadata is another's."
        )
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: the format's version is {header.get('version')!r}, this program "
            f"reads {VERSION}: use the program that wrote it."
        )
    arrays, metadata = header.get("arrays"), header.get("metadata")
    if not (isinstance(arrays, dict) and arrays and isinstance(metadata, dict)):
        raise _damaged(path, "metadata: its list of arrays is missing")
    for name, entry in arrays.items():
        if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype"}:
            raise _damaged(path, f"metadata: {name} has no shape and number format")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: the checkpoint is damaged ({reason}): write it again.")


def _reason(error: Exception, limit: int = 200) -> str:
    """The first line of an error, short enough to stand inside another one."""
    text = str(error).strip() or "no reason given"
    line = text.splitlines()[0]
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return f"{type(error).__name__}: {line}"
