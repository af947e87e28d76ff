"""The layouts in which DINOv2 is published, each a table read in both directions.

ViTConfig, layout --table_of--> {PyTorch name: Slot}: where each tensor lives
Model, layout --fitted--> the same function, in terms that the layout has
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from convert.layouts import dinov2, hugging_face, timm
from convert.layouts.table import Row, Table, slots
from sinder_jax import families, vit
from sinder_jax.model import Model


class Layout(NamedTuple):
    """A layout of PyTorch tensors.

    Attributes:
      owner: whose layout it is, for messages.
      rows: its tensors, in the order of the PyTorch model.
      layer_scale: True if its models always have LayerScale.
      positions: True if registers can have a position embedding.
    """

    owner: str
    rows: tuple[Row, ...]
    layer_scale: bool = False
    positions: bool = False


WRITTEN = {
    "dinov2": Layout("the DINOv2 hub files'", dinov2.ROWS),
    "hf": Layout("Hugging Face transformers'", hugging_face.STORED, layer_scale=True),
    "timm": Layout("timm's", timm.ROWS, positions=True),
}
IN_MEMORY = WRITTEN["hf"]._replace(
    owner="Hugging Face transformers 5's, as in its memory", rows=hugging_face.LIVE
)
LAYOUTS = WRITTEN | {"hf-memory": IN_MEMORY}


def check_name(layout: str, config: vit.ViTConfig | None = None) -> None:
    """Raises ValueError for a layout that cannot be written; lists those that can.

    Args:
      layout: its name.
      config: the model to write, whose family may come in some layouts only.
    """
    known = families.of(config).layouts if config else WRITTEN
    if layout not in known:
        allowed = ", ".join(repr(name) for name in known)
        raise ValueError(f"unknown layout {layout!r}; use {allowed}")


def table_of(layout: str, config: vit.ViTConfig) -> Table:
    """Every PyTorch tensor of a model by name, in the order of the PyTorch model.

    Args:
      layout: a key of `LAYOUTS`.
      config: the architecture.
    """
    stored = LAYOUTS[layout].layer_scale or families.of(config).layer_scale
    return slots(LAYOUTS[layout].rows, config, layer_scale=stored)


def fitted(model: Model, layout: str) -> Model:
    """The same function, in terms that a layout has.

    Only timm's has position embeddings of registers; for the others they are added to
    the registers for good. transformers' models always have LayerScale, of ones here.

    Args:
      model: the model to write.
      layout: a key of `LAYOUTS`.
    """
    config, has = model.config, LAYOUTS[layout]
    if has.layer_scale:
        config = dataclasses.replace(config, layer_scale=True)
    if has.positions or config.positions == "class":
        return dataclasses.replace(model, config=config)
    count = config.num_own_positions

    def leaf(path: str) -> np.ndarray:
        array = model.leaf(path)
        if path == "pos_embed":
            return np.concatenate([array[:, :1], array[:, count:]], axis=1)
        if path == "register_tokens":
            return array + model.leaf("pos_embed")[:, 1:count]
        return array

    return dataclasses.replace(
        model,
        config=dataclasses.replace(config, positions="class"),
        leaf=leaf,
        known_digest=None if count > 1 else model.known_digest,
        sha256={},
    )
