"""A model streamed leaf by leaf into files, so that it need not fit in memory.

Model --to_checkpoint--> a checkpoint directory of ours
Model, table --to_files--> .safetensors, .pth, a Hugging Face directory
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import layouts, source, write
from convert.ahead import ahead
from convert.source import Model
from convert.state_dict import Spec
from sinder_jax import checkpoint, param_tree


def to_checkpoint(model: Model, destination: Path, provenance: Mapping) -> str:
    """Streams a model into a checkpoint directory; gives its digest."""
    with checkpoint.ModelWriter(destination, model.config, provenance) as writer:
        for path, leaf in zip(
            model.shapes, ahead(model.leaf, model.shapes), strict=True
        ):
            writer.write(path, leaf)
        model.check_digest(writer.digest)
    return writer.digest


def to_files(
    model: Model,
    destination: Path,
    table: layouts.Table,
    provenance: Mapping[str, Any],
    *,
    as_directory: bool,
    files: Mapping[str, Any] | None = None,
) -> str:
    """Streams a model into PyTorch files; gives its digest.

    Args:
      model: the model.
      destination: a file, or a directory for Hugging Face.
      table: the tensors to write.
      provenance: to be stored.
      as_directory: whether a Hugging Face directory is made.
      files: what stands in it besides, see `write.write_hugging_face`.
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
        return source.metadata_of(model.config, provenance, found.hexdigest())

    specs = {key: Spec(slot.shape, "float32") for key, slot in table.items()}
    if as_directory:
        write.write_hugging_face(
            destination, model.config, specs, tensors(), metadata, files
        )
    else:
        write.write_tensors(destination, specs, tensors(), metadata)
    return found.hexdigest()
