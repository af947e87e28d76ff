"""`to-jax`: a PyTorch model becomes a checkpoint directory.

SRC or a name to download --> Model --> DST --verify--> JAX and PyTorch compared
"""

import re
from pathlib import Path
from typing import Any

from convert import fetch, infer, opening
from convert.commands import lines
from convert.verify import print_verdict
from sinder_jax import model as models
from sinder_jax import vit
from sinder_jax.model import Model
from sinder_jax.storage import array_store, paths


def to_jax(
    src: str,
    destination: Path,
    verify: bool = False,
    **told: Any,
) -> None:
    """Makes a checkpoint directory from a PyTorch model; prints what was checked.

    Args:
      src: a file, a Hugging Face directory, or the name of weights to download.
      destination: a directory that does not exist.
      verify: True compares JAX and PyTorch on a photograph.
      **told: what the files do not say, as for `convert.open_model`.
    """
    paths.check_apart(destination, src)
    array_store.check_destination(destination)
    model = open_source(src, **told)
    if model.torch is None:
        raise ValueError(f"{model.path} is a checkpoint already")
    lines.print_notes(lines.notes(model))
    converted = model.with_step(f"to-jax, {array_store.tool()}")
    digest = models.save(destination, converted)
    if verify:
        source = Path(model.path or src)
        known = {name: told[name] for name in ("num_heads", "prefix") if name in told}
        print_verdict(destination, source, made=destination, **known)
    lines.print_proof(destination, model, model.num_tensors, digest)


def open_source(src: str, **told: Any) -> Model:
    """Opens a path or, if nothing is there, downloads the weights of that name."""
    mistyped = not Path(src).exists() and re.fullmatch(r"dinov2_\w+", src)
    if not (fetch.is_name(src) or mistyped):
        return opening.open_model(Path(src), **told)
    path = fetch.fetch(src)
    model = opening.open_model(path, name=src, **told)
    hub_model = fetch.MODELS.get(src)
    if hub_model and models.differences(model.config, vit.CONFIGS[hub_model.name]):
        raise ValueError(
            f"{path}: got a {infer.describe(model.config)}, expected {src}; remove the "
            "file and try again"
        )
    return model
