"""PyTorch names and axes <-> the params tree: one table per layout, for both ways.

    state dict --from_torch--> (config inferred from the tensors, stacked params)
    config, params --to_torch--> state dict, names in the order of the PyTorch model

A row says which PyTorch tensor is which leaf and how its axes move; the way back swaps
the two sides of the same pattern. No arithmetic is done on a float32 tensor, so both
ways together give back the bytes that came in.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from sinder_jax import checkpoint, vit

FLOATS = ("float16", "bfloat16", "float32", "float64")
LISTED = 20  # names of one kind in an error; a wrong file misses hundreds


class Row(NamedTuple):
    """One PyTorch tensor and the leaf it becomes.

    Attributes:
      key: its PyTorch name; `{i}` counts the blocks.
      path: the leaf; below `blocks` its leading axis counts the blocks.
      pattern: einops, axes of PyTorch -> axes of the leaf (of one block).
    """

    key: str
    path: str
    pattern: str


# In the order of the PyTorch model, as its state dict lists them. A row counts where
# the architecture has its leaf: FFN and registers need no conditions.
DINOV2 = (
    Row("cls_token", "cls_token", "one n d -> one n d"),
    Row("pos_embed", "pos_embed", "one n d -> one n d"),
    Row("register_tokens", "register_tokens", "one n d -> one n d"),
    Row("mask_token", "mask_token", "one d -> one d"),
    Row("patch_embed.proj.weight", "patch_embed/kernel", "d c y x -> y x c d"),
    Row("patch_embed.proj.bias", "patch_embed/bias", "d -> d"),
    Row("blocks.{i}.norm1.weight", "blocks/norm1/scale", "d -> d"),
    Row("blocks.{i}.norm1.bias", "blocks/norm1/bias", "d -> d"),
    Row("blocks.{i}.attn.qkv.weight", "blocks/attn/qkv/kernel", "o i -> i o"),
    Row("blocks.{i}.attn.qkv.bias", "blocks/attn/qkv/bias", "o -> o"),
    Row("blocks.{i}.attn.proj.weight", "blocks/attn/proj/kernel", "o i -> i o"),
    Row("blocks.{i}.attn.proj.bias", "blocks/attn/proj/bias", "o -> o"),
    Row("blocks.{i}.ls1.gamma", "blocks/ls1/gamma", "d -> d"),
    Row("blocks.{i}.norm2.weight", "blocks/norm2/scale", "d -> d"),
    Row("blocks.{i}.norm2.bias", "blocks/norm2/bias", "d -> d"),
    Row("blocks.{i}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "o i -> i o"),
    Row("blocks.{i}.mlp.fc1.bias", "blocks/mlp/fc1/bias", "o -> o"),
    Row("blocks.{i}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "o i -> i o"),
    Row("blocks.{i}.mlp.fc2.bias", "blocks/mlp/fc2/bias", "o -> o"),
    Row("blocks.{i}.mlp.w12.weight", "blocks/mlp/w12/kernel", "o i -> i o"),
    Row("blocks.{i}.mlp.w12.bias", "blocks/mlp/w12/bias", "o -> o"),
    Row("blocks.{i}.mlp.w3.weight", "blocks/mlp/w3/kernel", "o i -> i o"),
    Row("blocks.{i}.mlp.w3.bias", "blocks/mlp/w3/bias", "o -> o"),
    Row("blocks.{i}.ls2.gamma", "blocks/ls2/gamma", "d -> d"),
    Row("norm.weight", "norm/scale", "d -> d"),
    Row("norm.bias", "norm/bias", "d -> d"),
)
LAYOUTS: dict[str, tuple[Row, ...]] = {"dinov2": DINOV2}

# Names that only one of the other layouts has.
FOREIGN = {
    "the Hugging Face layout": r"(^|\.)(encoder\.layer|embeddings)\.",
    "the timm layout": r"^reg_token$",
    "a DINOv2 training checkpoint": (
        r"^(teacher|student|backbone|module|model)(\.|$)|^blocks\.\d+\.\d+\."
    ),
}


class Slot(NamedTuple):
    """Where one PyTorch tensor lives in the params.

    Attributes:
      path: the leaf.
      part: what of the leaf it is, as an index: `(i,)` for block i, `()` for all.
      pattern: einops, axes of PyTorch -> axes of that part.
      shape: of the PyTorch tensor.
    """

    path: str
    part: tuple[int, ...]
    pattern: str
    shape: tuple[int, ...]


# --- The two directions -----------------------------------------------------------


def from_torch(
    state_dict: Mapping[str, Any], num_heads: int | None = None, **overrides: Any
) -> tuple[vit.ViTConfig, dict[str, Any]]:
    """Architecture and params of a PyTorch state dict.

    Args:
      state_dict: NumPy arrays by PyTorch name, in the layout of the DINOv2 hub files;
        float16, bfloat16 and float64 become float32.
      num_heads: None: embed_dim // 64, as in all DINOv2 models.
      overrides: fields of `vit.ViTConfig` that tensors cannot tell:
        `interpolate_antialias` and `interpolate_offset`. Without them the hub's: False
        and 0.1, with registers True and 0.0.

    Returns:
      The config, and params as float32 NumPy arrays that share no memory with the
      input.

    Raises:
      ValueError: another layout, an override that is unknown or contradicts the
        tensors, or tensors that do not fit: every missing, surplus and misshapen name,
        and every tensor that is not finite, in one message.
    """
    _check_layout(state_dict)
    config = infer_config(state_dict, num_heads, **overrides)
    slots = table("dinov2", config)
    misfits = _misfits(state_dict, slots)
    if misfits:
        raise ValueError(f"the tensors do not make a {_describe(config)}: {misfits}.")
    shapes = checkpoint.flatten(vit.param_shapes(config))
    flat = {path: np.empty(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for key, slot in slots.items():
        flat[slot.path][slot.part][...] = rearrange(state_dict[key], slot.pattern)
    return config, checkpoint.unflatten(flat)


def to_torch(
    config: vit.ViTConfig, params: Mapping[str, Any], layout: str = "dinov2"
) -> dict[str, np.ndarray]:
    """PyTorch state dict of a model: the inverse of `from_torch`.

    Args:
      config: the architecture.
      params: float32 arrays, of NumPy or JAX, in the layout of `vit.param_shapes`.
      layout: "dinov2".

    Returns:
      Contiguous float32 arrays by PyTorch name, in the order of the PyTorch model; they
      share no memory with `params`.

    Raises:
      ValueError: an unknown layout, or params that do not fit the config.
    """
    check_layout_name(layout)
    checkpoint.check_params(config, params)
    flat = {path: np.asarray(leaf) for path, leaf in checkpoint.flatten(params).items()}
    return {
        key: np.array(
            rearrange(flat[slot.path][slot.part], _inverse(slot.pattern)), order="C"
        )
        for key, slot in table(layout, config).items()
    }


def table(layout: str, config: vit.ViTConfig) -> dict[str, Slot]:
    """Every PyTorch tensor of a model, by name, in the order of the PyTorch model.

    Raises:
      ValueError: an unknown layout.
    """
    check_layout_name(layout)
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in checkpoint.flatten(vit.param_shapes(config)).items()
    }
    rows = [row for row in LAYOUTS[layout] if row.path in shapes]
    uncovered = shapes.keys() - {row.path for row in rows}
    assert not uncovered, f"no row of layout {layout} makes {sorted(uncovered)}"
    slots = {}
    for in_blocks, group in itertools.groupby(rows, key=lambda row: "{i}" in row.key):
        members = list(group)
        for i in range(config.depth if in_blocks else 1):
            for row in members:
                part = (i,) if in_blocks else ()
                shape = _torch_shape(row.pattern, shapes[row.path][len(part) :])
                slots[row.key.format(i=i)] = Slot(row.path, part, row.pattern, shape)
    return slots


def check_layout_name(layout: str) -> None:
    """Raises ValueError, listing the allowed ones, for a layout that has no table."""
    if layout not in LAYOUTS:
        allowed = ", ".join(repr(name) for name in LAYOUTS)
        raise ValueError(f"unknown layout {layout!r}: allowed is {allowed}.")


def _inverse(pattern: str) -> str:
    torch_axes, jax_axes = pattern.split(" -> ")
    return f"{jax_axes} -> {torch_axes}"


def _torch_shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # One number seen as an array of that shape: axes move, nothing is allocated.
    return rearrange(np.broadcast_to(np.float32(0), shape), _inverse(pattern)).shape


# --- Which architecture, which layout ---------------------------------------------


def infer_config(
    state_dict: Mapping[str, Any], num_heads: int | None = None, **overrides: Any
) -> vit.ViTConfig:
    """Architecture that a state dict in the hub's layout comes closest to.

    What a missing or misshapen tensor would tell is taken from others or from the hub
    models, so that the comparison with the whole table can name it.

    Args:
      state_dict: arrays by PyTorch name.
      num_heads: None: embed_dim // 64.
      overrides: as for `from_torch`.

    Raises:
      ValueError: nothing tells the width, a width that 64 does not divide and no
        `num_heads`, or overrides that are unknown or contradict the tensors.
    """
    seen = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    told = _told_by_tensors(seen)
    has_registers = bool(told["num_register_tokens"])
    resampling = {
        "interpolate_antialias": has_registers,
        "interpolate_offset": 0.0 if has_registers else 0.1,
    }
    _check_overrides(overrides, told, resampling)
    if num_heads is None:
        if told["embed_dim"] % 64:
            raise ValueError(
                "the number of attention heads is not in the tensors, and the width "
                f"{told['embed_dim']} is no multiple of 64, the width of DINOv2's "
                "heads: pass num_heads (--num-heads=N on the command line)."
            )
        num_heads = told["embed_dim"] // 64
    return vit.ViTConfig(num_heads=num_heads, **(told | resampling | overrides))


def _told_by_tensors(seen: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    embed_dim = _width(seen)
    patch_shape, positions = seen.get("patch_embed.proj.weight"), seen.get("pos_embed")
    patch_size = max(1, patch_shape[-1]) if patch_shape else 14
    rows = positions[-2] if positions and len(positions) > 1 else 1 + 37**2
    registers = seen.get("register_tokens", ())
    return {
        "embed_dim": embed_dim,
        "depth": _depth(seen),
        "ffn_layer": "swiglu" if any(".mlp.w" in key for key in seen) else "mlp",
        "img_size": max(1, math.isqrt(max(0, rows - 1))) * patch_size,
        "patch_size": patch_size,
        "num_register_tokens": registers[-2] if len(registers) > 1 else len(registers),
    }


def _width(seen: Mapping[str, tuple[int, ...]]) -> int:
    """Most common last axis of the tensors that end in it: one may be misshapen."""
    tokens = ("cls_token", "pos_embed", "mask_token")
    told_by = (*tokens, "patch_embed.proj.bias", "norm.weight", "norm.bias")
    widths = Counter(seen[key][-1] for key in told_by if seen.get(key))
    if not widths:
        raise ValueError(
            f"no DINOv2 model: none of {', '.join(told_by)} is there, but "
            f"{_listing(sorted(seen), limit=3) or 'nothing'}."
        )
    return widths.most_common(1)[0][0]


def _depth(seen: Mapping[str, tuple[int, ...]]) -> int:
    """Highest block + 1, within reason: a stray name must not ask for 10^9 blocks."""
    found = (re.match(r"blocks\.(\d{1,6})\.", key) for key in seen)
    blocks = {int(match[1]) for match in found if match}
    return max(1, min(max(blocks, default=0) + 1, 2 * len(blocks)))


def _check_overrides(
    overrides: Mapping[str, Any], told: Mapping[str, Any], resampling: Mapping[str, Any]
) -> None:
    known = [field.name for field in dataclasses.fields(vit.ViTConfig)]
    for name, value in overrides.items():
        if name not in known:
            near = difflib.get_close_matches(name, known) or sorted(resampling)
            raise ValueError(
                f"unknown option {name!r}: did you mean {' or '.join(near)}?"
            )
        if name in told and value != told[name]:
            raise ValueError(
                f"{name}={value!r} contradicts the tensors, which say {told[name]!r}."
            )
    antialias = overrides.get("interpolate_antialias", False)
    if not isinstance(antialias, bool):
        raise ValueError(
            f"interpolate_antialias is {antialias!r}: True or False is meant."
        )
    offset = overrides.get("interpolate_offset", 0.0)
    if not (isinstance(offset, int | float) and math.isfinite(offset) and offset >= 0):
        raise ValueError(
            f"interpolate_offset is {offset!r}: a number from 0 on is meant."
        )


def _check_layout(state_dict: Mapping[str, Any]) -> None:
    """Refuses the other layouts in which DINOv2 is published, each by its name."""
    found = _foreign_layout(state_dict)
    if found:
        layout, key = found
        raise ValueError(
            f"this looks like {layout} (it holds {key}); what is read is the dinov2 "
            "layout, that of the torch.hub files such as dinov2_vits14_pretrain.pth."
        )


def _foreign_layout(state_dict: Mapping[str, Any]) -> tuple[str, str] | None:
    for layout, pattern in FOREIGN.items():
        for key in state_dict:
            if re.search(pattern, key):
                return layout, key
    seen = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    rows = seen.get("pos_embed", ())[1:2]
    if rows and rows[0] > 1 and math.isqrt(rows[0]) ** 2 == rows[0]:
        return "the timm layout", f"pos_embed {seen['pos_embed']}, no class token in it"
    up, down = (seen.get(f"blocks.0.mlp.fc{n}.weight", ()) for n in (1, 2))
    if len(up) == len(down) == 2 and up[0] == 2 * down[1]:
        return "the timm layout", f"SwiGLU as blocks.0.mlp.fc1.weight {up}"
    return None


# --- Every misfit at once ---------------------------------------------------------


def _misfits(state_dict: Mapping[str, Any], slots: Mapping[str, Slot]) -> str:
    """All that is wrong with the tensors, in one line; empty where they fit."""
    floats = {key for key, value in state_dict.items() if _is_float(value)}
    kinds = {
        "missing": [key for key in slots if key not in state_dict],
        "surplus": [key for key in state_dict if key not in slots],
        "misshapen": [
            f"{key} is {tuple(state_dict[key].shape)}, not {slot.shape}"
            for key, slot in slots.items()
            if key in state_dict and tuple(state_dict[key].shape) != slot.shape
        ],
        f"no NumPy array of {', '.join(FLOATS)}": [
            f"{key} ({getattr(value, 'dtype', type(value).__name__)})"
            for key, value in state_dict.items()
            if key not in floats
        ],
        "with NaN or infinity (as float32)": [
            key
            for key in state_dict
            if key in floats and not _is_finite(state_dict[key])
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {_listing(names)}"
        for kind, names in kinds.items()
        if names
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.name in FLOATS


def _is_finite(array: np.ndarray) -> bool:
    with np.errstate(all="ignore"):  # a float64 beyond float32 becomes infinite
        return vit.is_finite(array.astype(np.float32, copy=False))


def _listing(names: Sequence[str], limit: int = LISTED) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _describe(config: vit.ViTConfig) -> str:
    name = hub_name(config)
    if name:
        return name
    registers = config.num_register_tokens
    return (
        f"DINOv2 model of width {config.embed_dim}, {config.depth} blocks, FFN "
        f"{config.ffn_layer}, {registers} registers, image size {config.img_size}"
    )


def hub_name(config: vit.ViTConfig) -> str | None:
    """Name of the torch.hub model of this architecture, however it resamples."""
    for name, hub in vit.CONFIGS.items():
        same_resampling = dataclasses.replace(
            hub,
            interpolate_antialias=config.interpolate_antialias,
            interpolate_offset=config.interpolate_offset,
        )
        if same_resampling == config:
            return name
    return None
