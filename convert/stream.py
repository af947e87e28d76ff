"""Streams a model leaf by leaf into PyTorch files, so that it need not fit in memory.

Model, table --to_files--> .safetensors, .pth, a Hugging Face directory

`sinder_jax.model.save` does the same for a checkpoint directory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import layouts, source, write
from convert.state_dict import Spec
from sinder_jax import param_tree
from sinder_jax.model import Model


def to_files(
    model: Model,
    destination: Path,
    table: layouts.Table,
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
      files: its other files, see `write.write_hugging_face`.
    """
    found = param_tree.ModelDigest()

    def recorded(path: str) -> np.ndarray:
        array = model.leaf(path)
        found.add(path, array, model.sha256.get(path, ""))
        return array

    def tensors() -> write.Tensors:
        yield from layouts.to_tensors(table, recorded)
        model.check_digest(found.hexdigest())  # before the file appears

    def metadata() -> dict[str, str]:
        return source.metadata_of(model.config, model.provenance, found.hexdigest())

    specs = {key: Spec(slot.shape, "float32") for key, slot in table.items()}
    if as_directory:
        write.write_hugging_face(
            destination, model.config, specs, tensors(), metadata, files
        )
    else:
        write.write_tensors(destination, specs, tensors(), metadata)
    return found.hexdigest()
