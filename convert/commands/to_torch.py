"""`to-torch`: a model becomes a PyTorch file or a Hugging Face directory.

SRC --> Model --> DST --verify--> JAX and PyTorch compared
SRC, FILE --> DST: FILE's heads, prefixes and number formats, SRC's backbone
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from convert import layouts, opening, repaired_copy, saving
from convert.commands import lines
from convert.files import hugging_face, writing
from convert.layouts import table as tables
from convert.verify import print_verdict
from sinder_jax import cli, families
from sinder_jax import model as models
from sinder_jax.storage import array_store, paths


def to_torch(
    src: Path,
    destination: Path,
    layout: str = "",
    into: Path | None = None,
    verify: bool = False,
    **told: Any,
) -> None:
    """Writes a model for PyTorch; prints what was checked.

    Args:
      src: a checkpoint directory, or a PyTorch model to write in another layout.
      destination: a file, or for the layout hf a directory, that does not exist.
      layout: a key of `layouts.WRITTEN`; empty: "dinov2", or that of `into`.
      into: the PyTorch file or directory to copy, with another backbone.
      verify: True compares JAX and PyTorch on a photograph.
      **told: what the files do not say, as for `convert.open_model`.
    """
    if into:
        if layout:
            raise ValueError(f"a copy has the layout of {into}; leave out --layout")
        _write_into(src, destination, into, **told)
        if verify:
            print_verdict(src, destination, made=destination, **told)
        return
    layout = layout or "dinov2"
    layouts.check_name(layout)
    directory = layout == "hf"
    if directory and destination.suffix in writing.WRITERS:
        raise ValueError(
            f"{destination}: the layout hf makes a directory of several files; use a "
            f"name without {destination.suffix}"
        )
    paths.check_apart(destination, src)
    saving.check_destination(destination, directory=directory)
    model = opening.open_model(src, **told)
    layouts.check_name(layout, model.config)
    lines.print_notes(lines.notes(model))
    lines.print_notes(lines.losses(model, layout))
    model = layouts.fitted(model, layout)
    table = layouts.table_of(layout, model.config)
    if directory and not hugging_face.wants_mask_token(model.provenance):
        table = {key: x for key, x in table.items() if x.path != tables.OPTIONAL}
    converted = model.with_step(f"to-torch {layout}, {array_store.tool()}")
    digest = saving.save(destination, converted, table, directory=directory)
    if verify:
        print_verdict(src, destination, made=destination, **told)
    lines.print_proof(destination, model, len(table), digest, layout)


def _write_into(
    src: Path,
    destination: Path,
    into: Path,
    num_heads: int | None = None,
    prefix: str | None = None,
) -> None:
    """Writes a copy of PyTorch files with the backbone of another model."""
    if not into.exists():  # before its kind decides what the destination must be
        raise FileNotFoundError(f"{into}: no such file or directory")
    paths.check_apart(destination, src, into)
    saving.check_destination(destination, directory=into.is_dir())
    model = opening.open_model(src, num_heads)
    family = families.of(model.config)
    base = opening.open_model(
        into,
        model.config.num_heads,
        prefix=prefix,
        norm_epsilon=family.norm_epsilon,
        statistics=family.statistics,
    )
    if base.torch is None:
        raise ValueError(f"{into} is a checkpoint, expected PyTorch files")
    repaired_copy.check_holds(destination, base)
    if different := models.differences(model.config, base.config):
        raise ValueError(f"{src} and {into} differ in {different}")
    lines.print_notes(lines.passed_through(base))

    def leaf(path: str, old: np.ndarray) -> np.ndarray:
        new = model.leaf(path)
        # Zeros stand for the mask token of a file that had none.
        return old if path == tables.OPTIONAL and not np.any(new) else new

    made = model.with_step(
        f"to-torch into {cli.shown(into.name)}, {array_store.tool()}"
    )
    made = dataclasses.replace(
        made,
        leaf=base.leaf,
        path=base.path,
        torch=base.torch,
        known_digest=None,
        sha256={},
    )
    changed = repaired_copy.of(made, leaf)
    lines.print_notes(repaired_copy.write(destination, made, changed))
    lines.print_proof(destination, model, base.num_tensors, changed.digest, base.layout)
