"""Streams a model leaf by leaf into PyTorch files, so that it need not fit in memory.

Model, table --to_files--> .safetensors, .pth, a Hugging Face directory

`sinder_jax.model.save` does the same for a checkpoint directory.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import source
from convert.files import hugging_face, writing
from convert.files.tensors import Spec
from convert.layouts import table as tables
from sinder_jax import param_tree
from sinder_jax.model import Model


def to_files(
    model: Model,
    destination: Path,
    table: tables.Table,
    *,
    as_directory: bool,
    files: Mapping[str, Any] | None = None,
) -> str:
    """Streams a model into PyTorch files; returns its digest.

    Args:
      model: the model; its provenance is stored with the weights.
      destination: a file, or a directory for Hugging Face.
      table: the tensors to write.
      as_directory: True makes a Hugging Face directory.
      files: its other files, see `writing.write_directory`.
    """
    found = param_tree.ModelDigest()

    def recorded(path: str) -> np.ndarray:
        array = model.leaf(path)
        found.add(path, array, model.sha256.get(path, ""))
        return array

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from tables.to_tensors(table, recorded)
        model.check_digest(found.hexdigest())  # before the file appears

    def metadata() -> dict[str, str]:
        return source.metadata_of(model.config, model.provenance, found.hexdigest())

    specs = {key: Spec(slot.shape, "float32") for key, slot in table.items()}
    if as_directory:
        contents = files or hugging_face.contents(model.config)
        writing.write_directory(destination, contents, specs, tensors(), metadata)
    else:
        writing.write_tensors(destination, specs, tensors(), metadata)
    return found.hexdigest()
