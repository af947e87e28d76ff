"""`to-jax` and `to-torch`: a model from one kind of files into another.

    SRC --source--> Model --stream--> DST --verify--> JAX and PyTorch compared

The functions print what they checked; errors are ValueError, OSError or ImportError.
"""

import re
from pathlib import Path
from typing import Any

from convert import fetch, infer, layouts, report, source, stream
from convert.files import writing
from sinder_jax import checkpoint
from sinder_jax import model as models
from sinder_jax.model import Model, differences
from sinder_jax.storage import array_store


def to_jax(
    src: str,
    destination: Path,
    num_heads: int | None = None,
    verify: bool = False,
    **overrides: Any,
) -> None:
    """Makes a checkpoint directory of a PyTorch model; prints what was checked.

    Args:
      src: a file, a Hugging Face directory, or the name of weights to fetch.
      destination: a directory that does not exist.
      num_heads: as for `convert.from_torch`.
      **overrides: likewise.
      verify: whether one photograph is run through JAX and PyTorch.
    """
    checkpoint.check_destination(destination)
    model = open_source(src, num_heads, **overrides)
    if model.torch is None:
        raise ValueError(f"{model.path} is a checkpoint already.")
    report.print_notes(model)
    converted = model.with_step(f"to-jax, {array_store.tool()}")
    found = models.save(destination, converted)
    if verify:
        _verify(destination, Path(model.path or src), made=destination)
    report.print_proof(destination, model.config, model.num_tensors, found)


def to_torch(
    src: Path,
    destination: Path,
    layout: str = "dinov2",
    num_heads: int | None = None,
    verify: bool = False,
) -> None:
    """Writes a model's weights for PyTorch; prints what was checked.

    Args:
      src: a checkpoint directory, or a PyTorch model to be brought into another layout.
      destination: a file, or for the layout hf a directory, that does not exist.
      layout: a key of `layouts.WRITTEN`.
      num_heads: None: what the files say, or embed_dim // 64.
      verify: whether one photograph is run through JAX and PyTorch.
    """
    layouts.check_name(layout)
    as_directory = layout == "hf"
    if as_directory and destination.suffix in writing.WRITERS:
        raise ValueError(
            f"{destination}: the layout hf makes a directory of several files; name "
            f"one without {destination.suffix}."
        )
    check = checkpoint.check_destination if as_directory else writing.check_destination
    check(destination)
    model = source.open_model(src, num_heads)
    report.print_notes(model)
    for note in report.losses(model, layout):
        print(f"note: {note}")
    table = layouts.table_of(layout, model.config)
    converted = model.with_step(f"to-torch {layout}, {array_store.tool()}")
    found = stream.to_files(converted, destination, table, as_directory=as_directory)
    if verify:
        _verify(src, destination, made=destination)
    report.print_proof(
        destination, model.config, len(table), found, f", {layout} layout"
    )


def open_source(src: str, num_heads: int | None = None, **overrides: Any) -> Model:
    """A model of a path or, where there is none, of a name that can be fetched."""
    mistyped = not Path(src).exists() and re.fullmatch(r"dinov2_\w+", src)
    if not (fetch.is_name(src) or mistyped):
        return source.open_model(Path(src), num_heads, **overrides)
    path = fetch.fetch(src)
    model = source.open_model(path, num_heads, name=src, **overrides)
    want = fetch.hub_config(src)
    if want and differences(model.config, want):
        raise ValueError(
            f"{path}, fetched as {src}, is a {infer.describe(model.config)}: remove "
            "the file and try again."
        )
    return model


def _verify(jax_side: Path, torch_side: Path, *, made: Path) -> None:
    """Prints how far JAX and PyTorch are apart on a photograph.

    Raises:
      ValueError: further than rounding; `made` is then removed.
    """
    from convert import verify

    ours = source.open_model(jax_side)
    theirs = source.open_model(torch_side, ours.config.num_heads)
    assert theirs.torch is not None
    layout = "hf" if theirs.layout.startswith("hf") else theirs.layout
    reason = verify.unavailable(layout)
    if reason is None and layout == "hf" and not torch_side.is_dir():
        reason = "transformers loads directories: not compared"
    if reason:
        print(f"verify: {reason}.")
        return
    torch_source = torch_side if layout == "hf" else theirs.torch.tensors()
    comparison = verify.compare(ours.config, ours.params, torch_source, layout)
    assert comparison is not None
    try:
        verify.check(comparison)
    except ValueError:
        writing.remove(made)
        raise
    print(f"verify: {comparison}.")
