"""`to-torch`: a model becomes a PyTorch file or a Hugging Face directory.

SRC --> Model --> DST --verify--> JAX and PyTorch compared
"""

from pathlib import Path

from convert import layouts, opening, saving
from convert.commands import lines
from convert.files import hugging_face, writing
from convert.layouts import table as tables
from convert.verify import print_verdict
from sinder_jax.storage import array_store, paths


def to_torch(
    src: Path,
    destination: Path,
    layout: str = "dinov2",
    num_heads: int | None = None,
    verify: bool = False,
) -> None:
    """Writes a model for PyTorch; prints what was checked.

    Args:
      src: a checkpoint directory, or a PyTorch model to write in another layout.
      destination: a file, or for the layout hf a directory, that does not exist.
      layout: a key of `layouts.WRITTEN`.
      num_heads: as for `convert.open_model`.
      verify: True compares JAX and PyTorch on a photograph.
    """
    layouts.check_name(layout)
    directory = layout == "hf"
    if directory and destination.suffix in writing.WRITERS:
        raise ValueError(
            f"{destination}: the layout hf makes a directory of several files; use a "
            f"name without {destination.suffix}"
        )
    paths.check_apart(destination, src)
    saving.check_destination(destination, directory=directory)
    model = opening.open_model(src, num_heads)
    layouts.check_name(layout, model.config)
    lines.print_notes(lines.notes(model))
    lines.print_notes(lines.losses(model, layout))
    table = layouts.table_of(layout, model.config)
    if directory and not hugging_face.wants_mask_token(model.provenance):
        table = {key: x for key, x in table.items() if x.path != tables.OPTIONAL}
    converted = model.with_step(f"to-torch {layout}, {array_store.tool()}")
    digest = saving.save(destination, converted, table, directory=directory)
    if verify:
        print_verdict(src, destination, made=destination, num_heads=num_heads)
    lines.print_proof(destination, model, len(table), digest, layout)
