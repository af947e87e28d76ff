"""The layouts in which DINOv2 is published, each a table read in both directions.

ViTConfig, layout --table_of--> {PyTorch name: Slot}: where each tensor lives
"""

from typing import NamedTuple

from convert.layouts import dinov2, hugging_face, timm
from convert.layouts.table import Row, Table, slots
from sinder_jax import families, vit


class Layout(NamedTuple):
    """A layout of PyTorch tensors.

    Attributes:
      owner: whose layout it is, for messages.
      rows: its tensors, in the order of the PyTorch model.
    """

    owner: str
    rows: tuple[Row, ...]


WRITTEN = {
    "dinov2": Layout("the DINOv2 hub files'", dinov2.ROWS),
    "hf": Layout("Hugging Face transformers'", hugging_face.STORED),
    "timm": Layout("timm's", timm.ROWS),
}
IN_MEMORY = Layout("Hugging Face transformers 5's, as in its memory", hugging_face.LIVE)
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
    return slots(LAYOUTS[layout].rows, config)
