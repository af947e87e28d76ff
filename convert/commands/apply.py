"""`apply`: a model repaired by a delta, in the model's own layout.

base, delta --leaf by leaf--> the repaired model, all else as in the base
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from convert import opening, repaired_copy, saving
from convert.commands import lines
from convert.files import sha256
from sinder_jax import cli, delta
from sinder_jax import model as models
from sinder_jax.storage import array_store, delta_file, paths


def apply(
    base: Path,
    delta_path: Path,
    destination: Path,
    scale: float = 1.0,
    **told: Any,
) -> None:
    """Writes a repaired model in the layout of its base; prints what was checked.

    Args:
      base: the model that the delta was made for, in any layout.
      delta_path: a file written by `diff`.
      destination: a file, or a directory if `base` is one, that does not exist.
      scale: the share of the change to apply, above 0 and at most 1.
      **told: what the files do not say, as for `convert.open_model`.
    """
    delta.check_scale(scale)
    if not base.exists():  # before its kind decides what the destination must be
        raise FileNotFoundError(f"{base}: no such file or directory")
    paths.check_apart(destination, base, delta_path)
    saving.check_destination(destination, directory=base.is_dir())
    repair, _ = delta_file.load(delta_path)
    model = opening.open_model(base, **told)
    if model.torch:
        repaired_copy.check_holds(destination, model)
        lines.print_notes(lines.passed_through(model))
    if different := models.differences(repair.config, model.config):
        raise ValueError(f"the architectures differ in {different}")
    delta.check_base(repair, model.digest)
    before_svd = lines.RunningSVD()

    def repaired(path: str, leaf: np.ndarray) -> np.ndarray:
        return delta.repaired_leaf(repair, path, leaf, scale, before_svd)

    step = (
        f"apply {cli.shown(delta_path.name)}, SHA-256 {sha256.of_file(delta_path)}, "
        f"scale {scale:g}, {array_store.tool()}"
    )
    made = model.with_step(step)
    if model.torch is None:
        made = dataclasses.replace(
            made,
            leaf=lambda path: repaired(path, model.leaf(path)),
            known_digest=None,
            sha256={},
        )
        digest = models.save(destination, made)
    else:
        changed = repaired_copy.of(made, repaired)
        digest = changed.digest
        lines.print_notes(repaired_copy.write(destination, made, changed))
    print(lines.about_delta(repair))
    lines.print_proof(destination, model, model.num_tensors, digest, model.layout)
