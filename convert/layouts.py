"""The layouts in which DINOv2 is published: one table each, read in both directions.

    ViTConfig, layout --table--> {PyTorch name: Slot}: where each tensor lives
    leaf of the params <--from_tensors / to_tensors--> the tensors it is made of

A row says which PyTorch tensor is which part of which leaf and how its axes move; the
way back swaps the two sides of the same pattern. Axes move, numbers do not change, so
both ways together give back the bytes that came in. The one exception is timm's class
token where a model has registers: there the position embedding is added to it for good.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from sinder_jax import kernels, param_tree, vit
from sinder_jax.storage.ahead import ahead

Index = tuple[Any, ...]
Leaf = Callable[[str], np.ndarray]  # the leaf of a flat name

# Parts of a leaf, as indices of its last axes.
_ALL: Index = ()
PARTS: dict[str, Callable[[int], Index]] = {
    "all": lambda size: _ALL,
    "q": lambda size: (..., kernels.PLACES["attn/q"].columns(size)),
    "k": lambda size: (..., kernels.PLACES["attn/k"].columns(size)),
    "v": lambda size: (..., kernels.PLACES["attn/v"].columns(size)),
    "gate": lambda size: (..., slice(0, size // 2)),
    "up": lambda size: (..., slice(size // 2, size)),
    "class": lambda size: (slice(None), slice(0, 1)),
    "patches": lambda size: (slice(None), slice(1, None)),
}


class Row(NamedTuple):
    """One PyTorch tensor and what of the params it is.

    Attributes:
      key: its PyTorch name; `{i}` counts the blocks.
      path: the leaf; below `blocks` its leading axis counts the blocks.
      pattern: einops, axes of PyTorch -> axes of the leaf (of one block).
      part: of the leaf, a name in `PARTS`; of q, k, v, gate and up by the last axis.
      plus: (path, part) of what is added to it in this layout.
      registers: whether the row is for models with registers; None: for all.
    """

    key: str
    path: str
    pattern: str
    part: str = "all"
    plus: tuple[str, str] | None = None
    registers: bool | None = None


STRIP = 32  # columns; 16 to 64 measured the same on 1536 x 8192
TOKEN, MASK = "one n d -> one n d", "one d -> one d"
MATRIX, VECTOR, PATCH = "o i -> i o", "d -> d", "d c y x -> y x c d"


def _linear(key: str, path: str, part: str = "all") -> tuple[Row, Row]:
    """Weight and bias of a linear layer."""
    return (
        Row(f"{key}.weight", f"{path}/kernel", MATRIX, part),
        Row(f"{key}.bias", f"{path}/bias", VECTOR, part),
    )


def _norm(key: str, path: str) -> tuple[Row, Row]:
    """Weight and bias of a layer normalization."""
    return (
        Row(f"{key}.weight", f"{path}/scale", VECTOR),
        Row(f"{key}.bias", f"{path}/bias", VECTOR),
    )


# A table is in the order of the PyTorch model, as its state dict lists the tensors. A
# row counts where the architecture has its leaf: FFNs and registers need no conditions.

_PATCH_EMBED = (
    Row("patch_embed.proj.weight", "patch_embed/kernel", PATCH),
    Row("patch_embed.proj.bias", "patch_embed/bias", VECTOR),
)
_BLOCK = (
    *_norm("blocks.{i}.norm1", "blocks/norm1"),
    *_linear("blocks.{i}.attn.qkv", "blocks/attn/qkv"),
    *_linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
    Row("blocks.{i}.ls1.gamma", "blocks/ls1/gamma", VECTOR),
    *_norm("blocks.{i}.norm2", "blocks/norm2"),
    *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
    *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
)
_END = (
    Row("blocks.{i}.ls2.gamma", "blocks/ls2/gamma", VECTOR),
    *_norm("norm", "norm"),
)

# facebookresearch/dinov2, dinov2/models/vision_transformer.py and the hub's files.
DINOV2 = (
    Row("cls_token", "cls_token", TOKEN),
    Row("pos_embed", "pos_embed", TOKEN),
    Row("register_tokens", "register_tokens", TOKEN),
    Row("mask_token", "mask_token", MASK),
    *_PATCH_EMBED,
    *_BLOCK,
    *_linear("blocks.{i}.mlp.w12", "blocks/mlp/w12"),
    *_linear("blocks.{i}.mlp.w3", "blocks/mlp/w3"),
    *_END,
)

# timm 1.0.31, vit_*_patch14_[reg4_]dinov2. With registers the class token includes its
# position; a SwiGLU's w12 and w3 are called fc1 and fc2; there is no mask token.
TIMM = (
    Row("cls_token", "cls_token", TOKEN, registers=False),
    Row("cls_token", "cls_token", TOKEN, plus=("pos_embed", "class"), registers=True),
    Row("reg_token", "register_tokens", TOKEN),
    Row("pos_embed", "pos_embed", TOKEN, registers=False),
    Row("pos_embed", "pos_embed", TOKEN, "patches", registers=True),
    *_PATCH_EMBED,
    *_BLOCK,
    *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/w12"),
    *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/w3"),
    *_END,
)


def _hugging_face(attention: Sequence[Row], swiglu: Sequence[Row]) -> tuple[Row, ...]:
    """A Hugging Face table: its versions differ in attention and SwiGLU only."""
    patches = "embeddings.patch_embeddings.projection"
    return (
        Row("embeddings.cls_token", "cls_token", TOKEN),
        Row("embeddings.mask_token", "mask_token", MASK),
        Row("embeddings.register_tokens", "register_tokens", TOKEN),
        Row("embeddings.position_embeddings", "pos_embed", TOKEN),
        Row(f"{patches}.weight", "patch_embed/kernel", PATCH),
        Row(f"{patches}.bias", "patch_embed/bias", VECTOR),
        *_norm("encoder.layer.{i}.norm1", "blocks/norm1"),
        *attention,
        Row("encoder.layer.{i}.layer_scale1.lambda1", "blocks/ls1/gamma", VECTOR),
        *_norm("encoder.layer.{i}.norm2", "blocks/norm2"),
        *_linear("encoder.layer.{i}.mlp.fc1", "blocks/mlp/fc1"),
        *_linear("encoder.layer.{i}.mlp.fc2", "blocks/mlp/fc2"),
        *swiglu,
        Row("encoder.layer.{i}.layer_scale2.lambda1", "blocks/ls2/gamma", VECTOR),
        *_norm("layernorm", "norm"),
    )


# transformers: Dinov2Model and Dinov2WithRegistersModel, as their files are stored.
HF = _hugging_face(
    [
        *_linear("encoder.layer.{i}.attention.attention.query", "blocks/attn/qkv", "q"),
        *_linear("encoder.layer.{i}.attention.attention.key", "blocks/attn/qkv", "k"),
        *_linear("encoder.layer.{i}.attention.attention.value", "blocks/attn/qkv", "v"),
        *_linear("encoder.layer.{i}.attention.output.dense", "blocks/attn/proj"),
    ],
    [
        *_linear("encoder.layer.{i}.mlp.weights_in", "blocks/mlp/w12"),
        *_linear("encoder.layer.{i}.mlp.weights_out", "blocks/mlp/w3"),
    ],
)

# The same models in the memory of transformers 5 (5.24), `model.state_dict()`.
HF_MEMORY = _hugging_face(
    [
        *_linear("encoder.layer.{i}.attention.q_proj", "blocks/attn/qkv", "q"),
        *_linear("encoder.layer.{i}.attention.k_proj", "blocks/attn/qkv", "k"),
        *_linear("encoder.layer.{i}.attention.v_proj", "blocks/attn/qkv", "v"),
        *_linear("encoder.layer.{i}.attention.o_proj", "blocks/attn/proj"),
    ],
    [
        *_linear("encoder.layer.{i}.mlp.gate_proj", "blocks/mlp/w12", "gate"),
        *_linear("encoder.layer.{i}.mlp.up_proj", "blocks/mlp/w12", "up"),
        *_linear("encoder.layer.{i}.mlp.down_proj", "blocks/mlp/w3"),
    ],
)

WRITTEN: dict[str, tuple[Row, ...]] = {"dinov2": DINOV2, "hf": HF, "timm": TIMM}
LAYOUTS: dict[str, tuple[Row, ...]] = WRITTEN | {"hf-memory": HF_MEMORY}
DESCRIPTIONS = {
    "dinov2": "the DINOv2 hub files'",
    "hf": "Hugging Face transformers'",
    "hf-memory": "Hugging Face transformers 5's, as in its memory",
    "timm": "timm's",
}
# Of which a layout may have no tensor: pre-training alone reads it. It becomes zeros.
OPTIONAL = "mask_token"


class Slot(NamedTuple):
    """Where one PyTorch tensor of a model lives in the params.

    Attributes:
      path: the leaf.
      part: what of the leaf it is: `(i, ...)` for block i, `()` for all.
      pattern: einops, axes of PyTorch -> axes of that part.
      shape: of the PyTorch tensor.
      plus: (path, index) of what is added to it, or None.
    """

    path: str
    part: Index
    pattern: str
    shape: tuple[int, ...]
    plus: tuple[str, Index] | None


Table = dict[str, Slot]


def check_name(layout: str) -> None:
    """Raises ValueError, listing the allowed ones, for a layout that is not written."""
    if layout not in WRITTEN:
        allowed = ", ".join(repr(name) for name in WRITTEN)
        raise ValueError(f"unknown layout {layout!r}: allowed is {allowed}.")


def table(layout: str, config: vit.ViTConfig) -> Table:
    """Every PyTorch tensor of a model, by name, in the order of the PyTorch model.

    Args:
      layout: a key of `LAYOUTS`.
      config: the architecture.
    """
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in param_tree.flatten(param_tree.shapes(config)).items()
    }
    has_registers = config.num_register_tokens > 0
    rows = [
        row
        for row in LAYOUTS[layout]
        if row.path in shapes and row.registers in (None, has_registers)
    ]
    uncovered = shapes.keys() - {row.path for row in rows} - {OPTIONAL}
    assert not uncovered, f"no row of layout {layout} makes {sorted(uncovered)}"
    slots = {}
    for in_blocks, group in itertools.groupby(rows, key=lambda row: "{i}" in row.key):
        members = list(group)
        for block in range(config.depth if in_blocks else 1):
            for row in members:
                slots[row.key.format(i=block)] = _slot(
                    row, (block,) if in_blocks else (), shapes
                )
    return slots


def _slot(row: Row, block: Index, shapes: Mapping[str, tuple[int, ...]]) -> Slot:
    # One number seen as an array of that shape: axes move, nothing is allocated.
    leaf = np.broadcast_to(np.float32(0), shapes[row.path])
    index = (*block, *PARTS[row.part](leaf.shape[-1]))
    shape = rearrange(leaf[index], inverse(row.pattern)).shape
    plus = None
    if row.plus:
        path, part = row.plus
        plus = (path, PARTS[part](shapes[path][-1]))
    return Slot(row.path, index, row.pattern, shape, plus)


def inverse(pattern: str) -> str:
    """The einops pattern of the way back."""
    torch_axes, jax_axes = pattern.split(" -> ")
    return f"{jax_axes} -> {torch_axes}"


def from_tensors(
    path: str,
    shape: tuple[int, ...],
    slots: Table,
    tensor: Callable[[str], np.ndarray],
) -> np.ndarray:
    """One leaf out of the PyTorch tensors it is made of.

    Args:
      path: its flat name.
      shape: its shape.
      slots: the table of the model, or the rows of it that are there.
      tensor: gives a tensor by its PyTorch name, of any float format.

    Returns:
      float32; what no tensor tells is zero.
    """
    # Not zeros at first: NumPy gives np.empty alone the large pages that make it fast.
    leaf = np.empty(shape, np.float32)
    if not any(slot.path == path for slot in slots.values()):
        leaf[...] = 0
    for key, slot in slots.items():
        if slot.path == path:
            with np.errstate(over="ignore"):  # a float64 too large: seen as infinite
                assign(leaf[slot.part], rearrange(tensor(key), slot.pattern))
        if slot.plus and slot.plus[0] == path:
            # Already in the other tensor; -0.0 adds nothing, not even to a -0.0.
            leaf[slot.plus[1]] = -0.0
    return leaf


def to_tensors(slots: Table, leaf: Leaf) -> Iterator[tuple[str, np.ndarray]]:
    """The PyTorch tensors of a model, leaf after leaf: each is asked for once.

    Args:
      slots: the table of the model, or the rows of it that are wanted.
      leaf: gives a leaf by its flat name, float32.

    Yields:
      Name and contiguous float32 tensor that shares no memory with the leaf; names in
      the order of the leaves.
    """
    by_path: dict[str, list[str]] = {}
    for key, slot in slots.items():
        by_path.setdefault(slot.path, []).append(key)
    added = {slot.plus[0] for slot in slots.values() if slot.plus}
    kept = {path: leaf(path) for path in added}  # small: the positions

    def once(path: str) -> np.ndarray:
        return kept[path] if path in kept else leaf(path)

    for keys, source in zip(by_path.values(), ahead(once, by_path), strict=True):
        for key in keys:
            slot = slots[key]
            part = source[slot.part]
            if slot.plus:
                part = part + kept[slot.plus[0]][slot.plus[1]]
            tensor = np.empty(slot.shape, np.float32)
            assign(tensor, rearrange(part, inverse(slot.pattern)))
            yield key, tensor


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source; a transposed matrix in strips, which is 3 times as fast."""
    width = STRIP if target.ndim == 2 else max(1, target.shape[-1])
    for start in range(0, target.shape[-1], width):
        target[..., start : start + width] = source[..., start : start + width]
