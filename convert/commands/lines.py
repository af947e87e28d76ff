"""What the commands print: proof, notes, origin, the running SVD."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import infer, saving
from convert.layouts import table as tables
from convert.opening import ENTRY
from sinder_jax import cli, delta, families, vit
from sinder_jax.model import Model


def print_proof(
    destination: Path, model: Model, num_tensors: int, digest: str, layout: str = ""
) -> None:
    """Prints the last line of a conversion: what was written, and what was checked.

    Args:
      destination: where the model was written.
      model: the model.
      num_tensors: number of tensors written.
      digest: the model's digest.
      layout: layout of the tensors; empty for a checkpoint directory.
    """
    title = infer.describe(model.config) + (f", {layout} layout" if layout else "")
    print(
        f"{cli.shown(destination)}: {title}, {num_tensors} tensors, "
        f"{model.num_params:,} parameters, digest {digest}; "
        "names, shapes and finite values checked."
    )


def print_notes(notes: Iterable[str]) -> None:
    """Prints `notes` or `losses`, a line each."""
    for note in notes:
        print(f"note: {note}")


def notes(model: Model) -> Iterator[str]:
    """What a PyTorch model lacks, or what is read differently than it is stored."""
    if model.torch is None:
        return
    heads = model.torch.statements["num_heads"]
    if heads.words == infer.NARROW_HEADS:
        yield f"heads are {heads.words}: give --num-heads=N if that is wrong."
    if converted := [name for name in model.torch.formats if name != "float32"]:
        yield f"{' and '.join(converted)} became float32."
    if model.torch.fills_mask_token:
        yield "no mask token (only pre-training reads it): filled with zeros."
    if left_out := model.torch.left_out:
        yield (
            f"left out, not part of the backbone: {len(left_out)} entries, "
            f"{grouped(left_out)}; to-torch --into={cli.shown(model.path)} writes them "
            "again."
        )
    yield from untold_statistics(model)
    if model.layout == "timm" and not model.config.interpolate_antialias:
        yield (
            "at other image sizes the position embedding is resampled as by the hub, "
            "with offset 0.1; timm antialiases: --interpolate-antialias=true "
            "--interpolate-offset=0 does the same."
        )
    plain = model.config.num_register_tokens == 0
    if model.layout.startswith("hf") and plain and model.config.interpolate_offset:
        yield (
            "at other image sizes the position embedding is resampled as by the hub, "
            f"with offset {model.config.interpolate_offset}; transformers uses 0: "
            "--interpolate-offset=0 does the same."
        )


def untold_statistics(model: Model) -> Iterator[str]:
    """A note if ImageNet's statistics are a guess: for PyTorch files but the hub's."""
    if model.torch is None or "statistics" in _told(model):
        return
    narrow = model.config.embed_dim < infer.NARROWEST
    if model.layout != "dinov2" or not (narrow or infer.hub_name(model.config)):
        yield (
            "no file tells mean and standard deviation of the images: ImageNet's are "
            "taken, as for DINOv2; else convert with to-jax --mean=R,G,B --std=R,G,B"
            f"{_own(model)}."
        )


def _told(model: Model) -> Mapping[str, Any]:
    """Who says what; a file of this program says its family's values by silence."""
    statements = model.torch.statements
    if ENTRY not in model.torch.state.metadata:
        return statements
    return dict.fromkeys(vit.OWN, "its metadata") | statements


def _own(model: Model) -> str:
    """The statistics of models of the same shapes that have their own."""
    usual = families.of(model.config).statistics
    return "".join(
        f"; {name} has {_numbers(stated.mean)} and {_numbers(stated.std)}"
        for name in infer.same_shapes(model.config)
        if name in families.RELATIVES
        and (stated := families.RELATIVES[name].statistics) != usual
    )


def _numbers(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def grouped(names: Iterable[str]) -> str:
    """Names by their first part, and how many begin with it: "head (2), loss"."""
    counts = Counter(name.partition(".")[0] for name in names)
    groups = [f"{name} ({n})" if n > 1 else name for name, n in counts.items()]
    return infer.listing(groups)


def untold(model: Model) -> Iterator[str]:
    """What no file tells of a PyTorch model, and what is taken instead."""
    if model.torch is None:
        return
    config, told = model.config, _told(model)
    family = families.of(config)
    taken = {
        "statistics": "mean and standard deviation of the images (ImageNet's)",
        "norm_epsilon": f"the LayerNorms' epsilon ({family.norm_epsilon:g})",
    }
    yield from (what for field, what in taken.items() if field not in told)
    if told["num_heads"].words in infer.GUESSES:
        yield f"the number of heads ({config.num_heads})"
    if told["interpolate_offset"].words.endswith("in the hub"):
        yield "how positions are resampled (as by the hub)"
    if model.layout == "timm" and config.ffn_layer == "swiglu":
        yield "which half of fc1 is the gate (the first, as in SwiGLUPacked)"


def passed_through(model: Model) -> Iterator[str]:
    """What `apply` copies from a PyTorch model, and how it rounds."""
    if others := model.torch.left_out:
        yield (
            f"not part of the backbone, written as they are: {len(others)} entries, "
            f"{grouped(others)}."
        )
    if short := [x for x in model.torch.formats if x in ("float16", "bfloat16")]:
        yield f"repaired kernels are rounded to {' and '.join(short)}, as in the base."


def unusual(config: vit.ViTConfig) -> Iterator[str]:
    """The values that a model has in place of its family's."""
    family, own = families.named(config.family), config.own
    if config.hidden_width is not None:
        usual = dataclasses.replace(config, hidden_width=None).hidden_dim
        yield f"the FFN's hidden width is {config.hidden_width}, DINOv2 has {usual}."
    if "norm_epsilon" in own:
        yield (
            f"the LayerNorms' epsilon is {config.norm_epsilon:g}, DINOv2 has "
            f"{family.norm_epsilon:g}."
        )
    if "statistics" in own:
        yield "images are normalized by the model's own mean and standard deviation."
    if "layer_scale" in own:
        yield "there is no LayerScale; the params hold ones."
    if config.positions == "all":
        yield "registers have position embeddings of their own."


def losses(model: Model, layout: str) -> Iterator[str]:
    """What a layout has no place for, or defines differently than this model."""
    config = model.config
    registers = config.num_register_tokens > 0
    if layout != "hf" and saving.too_long(model):
        yield "the keys of config.json do not fit into the file: left out."
    if layout == "timm":
        if np.any(model.leaf("mask_token")):
            yield "timm's layout has no mask token (only pre-training reads it)."
        if tables.is_folded(config):
            yield "timm adds the class token's position embedding to it for good."
    elif config.positions == "all":
        yield (
            f"layout {layout} has no position embeddings of registers: they are added "
            "to the registers for good."
        )
    if layout == "hf" and not families.of(config).layer_scale:
        yield "transformers' models have LayerScale: it is written as ones."
    hub = families.of(config).variant(config.num_register_tokens)
    other = {
        "dinov2": (hub.interpolate_antialias, hub.interpolate_offset),
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


def about_delta(made: delta.Delta) -> str:
    """What a repair changed, and by how much."""
    blocks = delta.touched(made)
    largest = {name: float(np.abs(e).max()) for name, e in made.eps.items()}
    listed = ", ".join(f"{name} {x:.3g}" for name, x in largest.items())
    return (
        f"changes {4 * len(blocks)} kernels in blocks {', '.join(map(str, blocks))}; "
        f"largest |ε|: {listed}"
    )


def origin(provenance: Mapping[str, Any]) -> str:
    """The file that first held the weights of a model."""
    if "source" not in provenance:
        return "not known"
    stated = {"layout": "?", "sha256": "?", "tool": "?", **provenance}
    template = "{source}, {layout} layout, SHA-256 {sha256}, read by {tool}"
    return template.format_map(stated)


class RunningSVD:
    """Shows which kernel's SVD is running: the giant's 160 take minutes."""

    def __init__(self):
        self._told: set[str] = set()

    def __call__(self, name: str, block: int) -> None:
        if sys.stderr.isatty():
            print(f"\rSVD of {name}, block {block} ", end="", file=sys.stderr)
        elif name not in self._told:
            print(f"SVDs of {name}", file=sys.stderr, flush=True)
        self._told.add(name)
