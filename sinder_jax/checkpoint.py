"""Models and other trees of arrays as checkpoint directories, checked on both ways.

    config, params --save--> DIR --load--> config, params
    tree, metadata --save_tree--> DIR --load_tree--> the same
    FOLDER/00000100, 00000200, ... --load_newest--> the newest that is not damaged

`storage.array_store` says what such a directory holds, on a disk or in a bucket (gs://).
It appears whole or not at all, and every array is verified against its digest when it
is read.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from sinder_jax import model, param_tree, vit
from sinder_jax.model import Model
from sinder_jax.storage import array_store, run_files
from sinder_jax.storage.array_store import check_destination
from sinder_jax.storage.paths import AnyPath, StrPath

__all__ = ["check_destination"]
Tree = dict[str, Any]


# --- A model ----------------------------------------------------------------------


def save(
    path: StrPath,
    config: vit.ViTConfig,
    params: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as the checkpoint directory `path`.

    Args:
      path: a directory that does not exist, in one that does.
      config: the architecture.
      params: float32 arrays, of NumPy or JAX, in the layout of `param_tree.shapes`.
      provenance: JSON values that say where the weights come from; None: not known.

    Raises:
      ValueError: params do not fit the config, or are not finite float32 numbers.
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: the directory around it is missing or closed.
    """
    check_destination(path)
    param_tree.check(config, params)
    model.save(path, Model.of(config, params, provenance))


def load(path: StrPath) -> tuple[vit.ViTConfig, Tree]:
    """Reads what `save` wrote.

    Returns:
      The architecture and its params, as float32 NumPy arrays.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: it is not a checkpoint of a model, is damaged (an array whose digest
        differs is named), or does not fit its own config; the message is one line.
    """
    opened = model.open_checkpoint(path)
    return opened.config, opened.params


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
      As `store.Writer`.
    """
    for keys in traverse_util.flatten_dict(dict(tree)):
        if not all(isinstance(key, str) and "/" not in key for key in keys):
            raise ValueError(f"{keys}: names must be text without a slash.")
    flat = {name: np.asarray(leaf) for name, leaf in param_tree.flatten(tree).items()}
    for name, array in flat.items():
        array_store.check_storable(name, array)
    with array_store.Writer(path, dict(metadata)) as writer:
        for name, array in flat.items():
            writer.write(name, array)


def load_tree(path: StrPath) -> tuple[Tree, dict[str, Any]]:
    """Reads what `save_tree` wrote.

    Returns:
      (tree, metadata): nested dicts of NumPy arrays in the stored number formats, and
      the JSON values.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: it is not a checkpoint, or it is damaged (`store.DamagedError`, which
        names the array); the message is one line.
    """
    reader = array_store.Reader(path)
    return param_tree.unflatten({name: reader.read(name) for name in reader.arrays}), (
        reader.metadata
    )


class Newest(NamedTuple):
    """What `load_newest` found.

    Attributes:
      path: its directory.
      tree, metadata: as from `load_tree`.
      damaged: newer ones that were passed over, each with the error that names the
        damaged array.
    """

    path: AnyPath
    tree: Tree
    metadata: dict[str, Any]
    damaged: dict[AnyPath, ValueError]


def load_newest(folder: StrPath) -> Newest | None:
    """The newest checkpoint of a folder whose bytes are those that were written.

    Returns:
      None where the folder holds no checkpoint, or does not exist.

    Raises:
      store.DamagedError: every one of them is damaged.
    """
    damaged: dict[AnyPath, ValueError] = {}
    for path in reversed(run_files.numbered(folder)):
        try:
            return Newest(path, *load_tree(path), damaged)
        except ValueError as error:  # also one whose metadata is gone
            damaged[path] = error
    if damaged:
        raise array_store.DamagedError(
            f"{folder}: none of its checkpoints is whole: "
            + " ".join(str(error) for error in damaged.values())
        )
    return None
