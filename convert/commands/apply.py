"""`apply`: a model repaired by a delta, in the model's own layout.

base, delta --leaf by leaf--> the repaired model
"""

import dataclasses
from pathlib import Path

import numpy as np

from convert import opening, saving
from convert.commands import lines
from convert.files import sha256
from sinder_jax import delta
from sinder_jax import model as models
from sinder_jax.storage import array_store, delta_file


def apply(
    base: Path,
    delta_path: Path,
    destination: Path,
    scale: float = 1.0,
    num_heads: int | None = None,
) -> None:
    """Writes a repaired model in the layout of its base; prints what was checked.

    Args:
      base: the model that the delta was made for, in any layout.
      delta_path: a file written by `diff`.
      destination: a file, or a directory if `base` is one, that does not exist.
      scale: the share of the change to apply, above 0 and at most 1.
      num_heads: None: what the files say, or embed_dim // 64.
    """
    delta.check_scale(scale)
    directory = base.is_dir()
    saving.check_destination(destination, directory=directory)
    repair, _ = delta_file.load(delta_path)
    model = opening.open_model(base, num_heads)
    lines.print_notes(lines.notes(model))
    if different := models.differences(repair.config, model.config):
        raise ValueError(f"the architectures differ in {different}")
    delta.check_base(repair, model.digest)
    before_svd = lines.RunningSVD()

    def leaf(path: str) -> np.ndarray:
        return delta.repaired_leaf(repair, path, model.leaf(path), scale, before_svd)

    step = (
        f"apply {delta_path.name}, SHA-256 {sha256.of_file(delta_path)}, scale "
        f"{scale:g}, {array_store.tool()}"
    )
    repaired = dataclasses.replace(
        model.with_step(step), leaf=leaf, known_digest=None, sha256={}
    )
    if model.torch is None:
        digest = models.save(destination, repaired)
    else:
        digest = saving.save(
            destination,
            repaired,
            model.torch.table,
            directory=directory,
            contents=model.torch.contents,
        )
    print(lines.about_delta(repair))
    lines.print_proof(destination, model, model.num_tensors, digest, model.layout)
