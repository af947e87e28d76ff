"""Models and other trees of arrays as checkpoint directories: the door to `storage`.

    config, params --save--> DIR --load--> config, params
    tree, metadata --save_tree--> DIR --load_tree--> the same
    FOLDER/00000100, 00000200, ... --load_newest--> the newest that is not damaged

A directory lies on a disk or in a bucket (gs://) and appears whole or not at all; every
array is verified against its digest when it is read (`storage.array_store`). To read a
model leaf by leaf, use `sinder_jax.model`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import traverse_util

from sinder_jax import model, param_tree, vit
from sinder_jax.model import Model
from sinder_jax.storage import array_store, run_files
from sinder_jax.storage.errors import DamagedError
from sinder_jax.storage.paths import AnyPath, StrPath

Tree = dict[str, Any]


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
      params: float32 arrays, NumPy or JAX, in the layout of `param_tree.shapes`.
      provenance: where the weights come from, as JSON values; None if unknown.

    Raises:
      ValueError: params do not fit the config, or are not finite float32 numbers.
      FileExistsError: `path` exists.
      FileNotFoundError, PermissionError: its directory is missing or not writable.
    """
    array_store.check_destination(path)
    param_tree.check(config, params)
    model.save(path, Model.of(config, params, provenance))


def load(path: StrPath) -> tuple[vit.ViTConfig, Tree]:
    """Reads what `save` wrote.

    Returns:
      The architecture and its params, as float32 NumPy arrays.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: not a model checkpoint, damaged (names the array whose digest
        differs), or its arrays do not fit its own config; one line.
    """
    opened = model.open_checkpoint(path)
    return opened.config, opened.params


def save_tree(
    path: StrPath, tree: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Writes nested dicts of arrays, and metadata that describes them.

    Waits for no other process: with many hosts, call it on process 0 alone.

    Args:
      path: a directory that does not exist, in one that does.
      tree: nested dicts with text as keys, arrays or numbers of any format as leaves;
        empty dicts are dropped, empty arrays are refused.
      metadata: JSON values.

    Raises:
      As `storage.array_store.writing`.
    """
    for keys in traverse_util.flatten_dict(dict(tree)):
        if not all(isinstance(key, str) and "/" not in key for key in keys):
            raise ValueError(f"{keys}: names must be text without a slash")
    with array_store.writing(path, dict(metadata)) as writer:
        for name, array in param_tree.flatten(tree).items():
            writer.write(name, array)


def load_tree(path: StrPath) -> tuple[Tree, dict[str, Any]]:
    """Reads what `save_tree` wrote.

    Returns:
      (tree, metadata): nested dicts of NumPy arrays in the stored number formats, and
      the JSON values.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: not a checkpoint, or damaged (`DamagedError`, which names the array);
        one line.
    """
    reader = array_store.Reader(path)
    return reader.read_all(), reader.metadata


class Newest(NamedTuple):
    """What `load_newest` found.

    Attributes:
      path: its directory.
      tree, metadata: as from `load_tree`.
      damaged: newer checkpoints that were skipped, each with the error that names the
        damaged array.
    """

    path: AnyPath
    tree: Tree
    metadata: dict[str, Any]
    damaged: dict[AnyPath, ValueError]


def load_newest(folder: StrPath) -> Newest | None:
    """Loads the newest checkpoint of a folder that is not damaged.

    Returns:
      None if the folder holds no checkpoint, or does not exist.

    Raises:
      DamagedError: all of them are damaged.
    """
    damaged: dict[AnyPath, ValueError] = {}
    for path in reversed(run_files.numbered(folder)):
        try:
            return Newest(path, *load_tree(path), damaged)
        except ValueError as error:  # also one whose metadata is gone
            damaged[path] = error
    if damaged:
        reasons = "; ".join(str(error) for error in damaged.values())
        raise DamagedError(f"{folder}: none of its checkpoints is whole: {reasons}")
    return None
