"""Writes a model as PyTorch files leaf by leaf, so that it need not fit in memory.

    Model, table of its layout --save--> .safetensors, .pth, a Hugging Face directory

`sinder_jax.model.save` does the same for a checkpoint directory.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.files import hugging_face, writing
from convert.files.tensors import MOST_TEXT, Spec
from convert.layouts import table as tables
from convert.opening import ENTRY
from sinder_jax import model as models
from sinder_jax import param_tree
from sinder_jax.model import Model
from sinder_jax.storage import array_store
from sinder_jax.storage.paths import StrPath


def save(
    path: StrPath,
    model: Model,
    table: tables.Table,
    *,
    directory: bool = False,
    overwrite: bool = False,
) -> str:
    """Writes a model with its description, see `model.description`.

    Args:
      path: the destination, which `check_destination` accepts.
      model: the model.
      table: the tensors to write, see `layouts.table_of`.
      directory: True makes a Hugging Face directory.
      overwrite: True replaces an existing file.

    Returns:
      The model's digest.

    Raises:
      As `writing.write_tensors`, `Model.leaf` and `Model.check_digest`.
    """
    found = param_tree.ModelDigest()

    def leaf(name: str) -> np.ndarray:
        array = model.leaf(name)
        found.add(name, array, model.sha256.get(name, ""))
        return array

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from tables.to_tensors(table, leaf)
        stored = {slot.path for slot in table.values()}
        for path in model.shapes.keys() - stored - {tables.OPTIONAL}:
            leaf(path)  # a LayerScale of ones, for the digest
        model.check_digest(found.hexdigest())  # before the file appears

    def metadata() -> dict[str, str]:
        return description(model, found.hexdigest())

    specs = {key: Spec(slot.shape, "float32") for key, slot in table.items()}
    if directory:
        extras = model.provenance.get("contents")
        contents = hugging_face.contents(model.config, extras)
        writing.write_directory(path, contents, specs, tensors(), metadata)
    else:
        writing.write_tensors(path, specs, tensors(), metadata, overwrite)
    return found.hexdigest()


def description(model: Model, digest: str) -> dict[str, str]:
    """Metadata of an exported file, which `opening.open_model` reads.

    Args:
      model: the model in the file.
      digest: 64 characters, also while the digest is not known yet.
    """
    stated = models.description(model.config, model.provenance, digest)
    if too_long(model):
        stated["provenance"].pop("contents")
    return {ENTRY: json.dumps(stated, sort_keys=True)}


def too_long(model: Model) -> bool:
    """True if the contents of the provenance do not fit into a file's metadata."""
    return len(json.dumps(model.provenance.get("contents"))) > MOST_TEXT // 4


def check_destination(path: Path, *, directory: bool) -> None:
    """Refuses a destination that `save` cannot write, before any work is done for it.

    Raises:
      As `writing.write_state_dict`.
    """
    check = array_store.check_destination if directory else writing.check_destination
    check(path)
