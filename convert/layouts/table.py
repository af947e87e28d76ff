"""What a layout's table consists of, and how it is read in both directions.

    rows, ViTConfig --slots--> {PyTorch name: Slot}: where each tensor lives
    leaf of the params <--from_tensors / to_tensors--> the tensors it is made of

A row says which PyTorch tensor is which part of which leaf and how its axes move; the
inverse swaps the two sides of the same pattern. Axes move and numbers stay, so that
converting there and back returns the same bytes. The one exception is timm's class
token in models with registers: its position embedding is added to it for good.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from sinder_jax import kernels, param_tree, vit
from sinder_jax.storage.ahead import ahead

Index = tuple[Any, ...]

# Parts of a leaf: from the size of its last axis to an index of its last axes.
PARTS: dict[str, Callable[[int], Index]] = {
    "all": lambda size: (),
    "q": lambda size: (..., kernels.PLACES["attn/q"].columns(size)),
    "k": lambda size: (..., kernels.PLACES["attn/k"].columns(size)),
    "v": lambda size: (..., kernels.PLACES["attn/v"].columns(size)),
    "gate": lambda size: (..., slice(0, size // 2)),
    "up": lambda size: (..., slice(size // 2, size)),
    "class": lambda size: (slice(None), slice(0, 1)),
    "patches": lambda size: (slice(None), slice(1, None)),
}

# Patterns: axes in PyTorch -> axes in the leaf.
TOKEN, MASK = "one n d -> one n d", "one d -> one d"
MATRIX, VECTOR, PATCH = "o i -> i o", "d -> d", "d c y x -> y x c d"

STRIP = 32  # columns; 16 to 64 were equally fast on 1536 x 8192
# The leaf for which a layout may have no tensor, since only pre-training reads it. It
# becomes zeros.
OPTIONAL = "mask_token"
# Files of a model without LayerScale have no tensors for these. They become ones.
LAYER_SCALES = ("blocks/ls1/gamma", "blocks/ls2/gamma")


class Row(NamedTuple):
    """One PyTorch tensor, and which part of the params it is.

    A row applies to the architectures that have its leaf, so that FFN kinds and
    registers need no conditions.

    Attributes:
      key: PyTorch name; `{i}` is the number of the block.
      path: leaf of the params; below `blocks` its leading axis counts the blocks.
      pattern: einops pattern, PyTorch's axes -> axes of the leaf (of one block).
      part: which part of the leaf, a key of `PARTS`.
      plus: (path, part) of what this layout adds to the tensor.
      folded: True or False limits the row to models for which timm adds the class
        token's position embedding to it, or to the others; see `is_folded`.
    """

    key: str
    path: str
    pattern: str
    part: str = "all"
    plus: tuple[str, str] | None = None
    folded: bool | None = None


def linear(key: str, path: str, part: str = "all") -> tuple[Row, Row]:
    """Weight and bias of a linear layer."""
    return (
        Row(f"{key}.weight", f"{path}/kernel", MATRIX, part),
        Row(f"{key}.bias", f"{path}/bias", VECTOR, part),
    )


def norm(key: str, path: str) -> tuple[Row, Row]:
    """Weight and bias of a layer normalization."""
    return (
        Row(f"{key}.weight", f"{path}/scale", VECTOR),
        Row(f"{key}.bias", f"{path}/bias", VECTOR),
    )


class Slot(NamedTuple):
    """Where one PyTorch tensor of a model lives in the params.

    Attributes:
      path: the leaf.
      part: index of the part of the leaf: `(i, ...)` for block i, `()` for all of it.
      pattern: einops pattern, PyTorch's axes -> axes of that part.
      shape: of the PyTorch tensor.
      plus: (path, index) of what is added to the tensor, or None.
    """

    path: str
    part: Index
    pattern: str
    shape: tuple[int, ...]
    plus: tuple[str, Index] | None


Table = dict[str, Slot]


def is_folded(config: vit.ViTConfig) -> bool:
    """True for models whose file in timm's layout has position rows of patches only."""
    registers = config.num_register_tokens > 0
    return config.positions == ("class" if registers else "patches")


def slots(
    rows: tuple[Row, ...], config: vit.ViTConfig, *, layer_scale: bool = True
) -> Table:
    """The slot of every tensor of a model by PyTorch name, in the order of the rows.

    Args:
      rows: of the layout.
      config: the architecture.
      layer_scale: False if there are no tensors for LayerScale.
    """
    shapes = param_tree.leaf_shapes(config)
    absent = () if layer_scale else LAYER_SCALES
    rows = tuple(
        row
        for row in rows
        if row.path in shapes
        and row.path not in absent
        and row.folded in (None, is_folded(config))
    )
    uncovered = shapes.keys() - {row.path for row in rows} - {OPTIONAL, *absent}
    assert not uncovered, f"no row of the layout makes {sorted(uncovered)}"
    found = {}
    for in_blocks, group in itertools.groupby(rows, key=lambda row: "{i}" in row.key):
        members = list(group)
        for block in range(config.depth if in_blocks else 1):
            for row in members:
                index = (block,) if in_blocks else ()
                found[row.key.format(i=block)] = _slot(row, index, shapes)
    return found


def _slot(row: Row, block: Index, shapes: Mapping[str, tuple[int, ...]]) -> Slot:
    # A view of one number in the leaf's shape: axes move, nothing is allocated.
    leaf = np.broadcast_to(np.float32(0), shapes[row.path])
    index = (*block, *PARTS[row.part](leaf.shape[-1]))
    shape = rearrange(leaf[index], inverse(row.pattern)).shape
    plus = None
    if row.plus:
        path, part = row.plus
        plus = (path, PARTS[part](shapes[path][-1]))
    return Slot(row.path, index, row.pattern, shape, plus)


def inverse(pattern: str) -> str:
    """The einops pattern of the inverse."""
    torch_axes, jax_axes = pattern.split(" -> ")
    return f"{jax_axes} -> {torch_axes}"


# --- Leaves and tensors -----------------------------------------------------------


def from_tensors(
    path: str,
    shape: tuple[int, ...],
    table: Table,
    tensor: Callable[[str], np.ndarray],
) -> np.ndarray:
    """Builds one leaf of the params from PyTorch tensors.

    Args:
      path: flat name of the leaf.
      shape: its shape.
      table: slots of the tensors that exist.
      tensor: returns a tensor of any float format by its PyTorch name.

    Returns:
      float32, in its own memory; zero where no tensor provides values, or
      one if the leaf is a LayerScale.
    """
    # Not np.zeros: only np.empty gets the large pages that make filling it fast.
    leaf = np.empty(shape, np.float32)
    if not any(slot.path == path for slot in table.values()):
        leaf[...] = 1 if path in LAYER_SCALES else 0
    for key, slot in table.items():
        if slot.path == path:
            with np.errstate(over="ignore"):  # a float64 too large becomes infinite
                assign(leaf[slot.part], rearrange(tensor(key), slot.pattern))
        if slot.plus and slot.plus[0] == path:
            # Already in the other tensor; adding -0.0 changes nothing, not even -0.0.
            leaf[slot.plus[1]] = -0.0
    return leaf


def to_tensors(
    table: Table, leaf: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Cuts a model into PyTorch tensors, leaf by leaf, the next one read ahead.

    Args:
      table: slots of the tensors wanted.
      leaf: returns a leaf by its flat name, float32; called once for each.

    Yields:
      (PyTorch name, contiguous float32 tensor in its own memory), ordered by leaf.
    """
    by_path: dict[str, list[str]] = {}
    for key, slot in table.items():
        by_path.setdefault(slot.path, []).append(key)
    added = {slot.plus[0] for slot in table.values() if slot.plus}
    kept = {path: leaf(path) for path in added}  # small: the position embedding

    def once(path: str) -> np.ndarray:
        return kept[path] if path in kept else leaf(path)

    for keys, whole in zip(by_path.values(), ahead(once, by_path), strict=True):
        for key in keys:
            slot = table[key]
            part = whole[slot.part]
            if slot.plus:
                part = part + kept[slot.plus[0]][slot.plus[1]]
            tensor = np.empty(slot.shape, np.float32)
            assign(tensor, rearrange(part, inverse(slot.pattern)))
            yield key, tensor


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source; copies transposed matrices in strips, 3 times as fast."""
    width = STRIP if target.ndim == 2 else max(1, target.shape[-1])
    for start in range(0, target.shape[-1], width):
        target[..., start : start + width] = source[..., start : start + width]
