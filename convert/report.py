"""What the commands say of a model or a delta: proof, notes, origin."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import infer
from sinder_jax import delta, param_tree, vit
from sinder_jax.model import Model


def title(config: vit.ViTConfig) -> str:
    """The hub's name of an architecture, or that it has none."""
    return infer.hub_name(config) or "a DINOv2 model of its own size"


def print_proof(
    destination: Path,
    config: vit.ViTConfig,
    num_tensors: int,
    found: str,
    detail: str = "",
) -> None:
    """Prints the last line of a conversion: what was written, and what was checked.

    Args:
      destination: where it is.
      config: the architecture.
      num_tensors: how many are there.
      found: the digest of the model.
      detail: what else to say of it.
    """
    print(
        f"{destination}: {title(config)}{detail}, {num_tensors} tensors, "
        f"{param_tree.num_params(config):,} parameters, digest {found}; names, shapes "
        "and finite values checked."
    )


def print_notes(model: Model) -> None:
    """Prints `notes`, a line each."""
    for note in notes(model):
        print(f"note: {note}")


def notes(model: Model) -> Iterator[str]:
    """What is not in a PyTorch model, or is read otherwise than it stands there."""
    if model.torch is None:
        return
    converted = [name for name in model.torch.formats if name != "float32"]
    if converted:
        yield f"{' and '.join(converted)} became float32."
    if model.torch.fills_mask_token:
        yield "no mask token (only pre-training reads it): filled with zeros."
    if left_out := model.torch.left_out:
        yield (
            f"left out, no part of the backbone: {len(left_out)} entries, "
            f"{infer.listing(left_out, limit=3)}."
        )
    plain = model.config.num_register_tokens == 0
    if model.layout.startswith("hf") and plain and model.config.interpolate_offset:
        yield (
            "other image sizes resample the position embedding as the hub does, by an "
            f"offset of {model.config.interpolate_offset}; transformers has none: "
            "--interpolate-offset=0 is its way."
        )


def losses(model: Model, layout: str) -> Iterator[str]:
    """What a layout has no place for, or defines otherwise than this model does."""
    config = model.config
    registers = config.num_register_tokens > 0
    if layout == "timm":
        if np.any(model.leaf("mask_token")):
            yield "timm's layout has no mask token (only pre-training reads it)."
        if registers:
            yield "timm adds the class token's position embedding to it for good."
    other = {
        "dinov2": (registers, 0.0 if registers else 0.1),
        "hf": (registers, 0.0),
        "timm": (True, 0.0),
    }[layout]
    ours = (config.interpolate_antialias, config.interpolate_offset)
    if ours != other:
        yield (
            f"{layout} resamples the position embedding by antialias {other[0]}, "
            f"offset {other[1]}, this model by {ours[0]}, {ours[1]}: features differ "
            f"slightly at other sizes than {config.img_size} pixels."
        )


def about_delta(made: delta.Delta) -> Iterator[str]:
    """What a delta changes, and how much."""
    blocks = delta.touched(made)
    largest = {name: float(np.abs(e).max()) for name, e in made.eps.items()}
    told = ", ".join(f"{name} {x:.3g}" for name, x in largest.items())
    yield (
        f"changes {4 * len(blocks)} kernels in blocks {', '.join(map(str, blocks))}; "
        f"largest |ε|: {told}"
    )


def origin(provenance: Mapping[str, Any]) -> str:
    """The file that the weights of a model first came in."""
    if "source" not in provenance:
        return "not known"
    told = {name: provenance.get(name, "?") for name in ("layout", "sha256", "tool")}
    return (
        f"{provenance['source']}, {told['layout']} layout, SHA-256 {told['sha256']}, "
        f"read by {told['tool']}"
    )
