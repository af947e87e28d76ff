"""Which layout and which architecture the tensors of a state dict are.

    names and shapes --backbone_keys--> names of a bare DINOv2 --layout_of--> "hf", ...
    --config_of--> ViTConfig, of which a whole table can be made and compared

Only names and shapes are looked at; the numbers may still be in a file.
"""

import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from convert import layouts
from sinder_jax import families, vit

Shape = tuple[int, ...]
LISTED = 20  # names of one kind in an error; a wrong file misses hundreds

# What wraps a backbone's names: training (DINOv2, DDP, torch.compile) and the heads of
# transformers. Where some names have such a prefix, those are the backbone.
TRAINING = ("teacher", "model", "module", "_orig_mod", "backbone")
PREFIXES = (*TRAINING, "dinov2", "dinov2_with_registers")
# What may stand beside it and is no part of it; left out by name.
OTHERS = r"(student|dino_head|ibot_head|dino_loss|ibot_patch_loss|classifier|head)\."
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")  # chunk, block: FSDP training
# Widths of these are the model's; more than one, for any may be misshapen.
TOKENS = ("cls_token", "pos_embed", "mask_token")
WIDE = (*TOKENS, "patch_embed/bias", "norm/scale", "norm/bias")


class Backbone(NamedTuple):
    """The names of a bare DINOv2 in a state dict that may hold more.

    Attributes:
      keys: bare name -> name in the state dict.
      left_out: names that belong to no backbone, such as training heads.
    """

    keys: dict[str, str]
    left_out: list[str]


def backbone_keys(names: Sequence[str]) -> Backbone:
    """Strips what training and classification wrap around the names of a backbone.

    Raises:
      ValueError: two names mean the same tensor.
    """
    keys, left_out = {name: name for name in names}, []
    while prefix := _prefix(keys):
        inside = {
            bare.removeprefix(prefix): name
            for bare, name in keys.items()
            if bare.startswith(prefix)
        }
        for bare, name in keys.items():
            if bare.startswith(prefix):
                continue
            if re.match(OTHERS, bare):
                left_out.append(name)
            else:
                inside[bare] = name  # surplus: the comparison with the table names it
        keys = inside
    return Backbone(_without_chunks(keys), left_out)


def _prefix(keys: Mapping[str, str]) -> str | None:
    for prefix in PREFIXES:
        if any(key.startswith(f"{prefix}.") for key in keys):
            return f"{prefix}."
    return None


def _without_chunks(keys: Mapping[str, str]) -> dict[str, str]:
    bare: dict[str, str] = {}
    for key, name in keys.items():
        key = CHUNKED.sub(r"blocks.\1.", key)
        if key in bare:
            raise ValueError(f"{bare[key]} and {name} are both {key}.")
        bare[key] = name
    return bare


# --- Layout -----------------------------------------------------------------------


def layout_of(seen: Mapping[str, Shape]) -> str:
    """The layout of a bare state dict, a key of `layouts.LAYOUTS`.

    A small, base or large model in timm's layout differs from the hub's by its missing
    mask token alone; what lacks one counts as timm's.

    Args:
      seen: shapes by bare name.
    """
    if any(re.match(r"(encoder\.layer|embeddings)\.", key) for key in seen):
        memory = any(re.search(r"\.([qkvo]|gate|up|down)_proj\.", key) for key in seen)
        return "hf-memory" if memory else "hf"
    own = ("register_tokens", "mask_token")
    if "reg_token" in seen or _is_packed(seen) or _is_folded(seen):
        return "timm"
    swiglu = any(".mlp.w" in key for key in seen)
    return "dinov2" if swiglu or any(key in seen for key in own) else "timm"


def _is_packed(seen: Mapping[str, Shape]) -> bool:
    """Whether fc1 makes gate and value of a SwiGLU at once."""
    up = (shape for key, shape in seen.items() if key.endswith(".mlp.fc1.weight"))
    down = (shape for key, shape in seen.items() if key.endswith(".mlp.fc2.weight"))
    # Of all blocks: that of one may be missing or misshapen.
    hidden_up = Counter(shape[0] for shape in up if len(shape) == 2)
    hidden_down = Counter(shape[1] for shape in down if len(shape) == 2)
    if not (hidden_up and hidden_down):
        return False
    return hidden_up.most_common(1)[0][0] == 2 * hidden_down.most_common(1)[0][0]


def _is_folded(seen: Mapping[str, Shape]) -> bool:
    """Whether the position embedding lacks the row of the class token."""
    rows = seen.get("pos_embed", ())[1:2]
    return bool(rows) and rows[0] > 1 and math.isqrt(rows[0]) ** 2 == rows[0]


# --- Architecture -----------------------------------------------------------------


def config_of(
    layout: str,
    seen: Mapping[str, Shape],
    num_heads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> vit.ViTConfig:
    """Architecture that a state dict comes closest to.

    What a missing or misshapen tensor would tell is taken from others or from the hub
    models, so that the comparison with the whole table can name it.

    Args:
      layout: from `layout_of`.
      seen: shapes by bare name.
      num_heads: None: embed_dim // 64.
      overrides: fields of `vit.ViTConfig` that tensors cannot tell.

    Raises:
      ValueError: nothing tells the width, a width that 64 does not divide and no
        `num_heads`, or overrides that are unknown or contradict the tensors.
    """
    overrides = overrides or {}
    family = families.named(overrides.get("family", families.DEFAULT))
    told = _told_by_tensors(layout, seen, family)
    variant = family.variant(told["num_register_tokens"])
    resampling = {
        "interpolate_antialias": variant.interpolate_antialias,
        "interpolate_offset": variant.interpolate_offset,
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
    return vit.ViTConfig(num_heads=num_heads, **(told | resampling | dict(overrides)))


def _told_by_tensors(
    layout: str, seen: Mapping[str, Shape], family: families.Family
) -> dict[str, Any]:
    leaves = _by_leaf(layout, seen)
    patch_shape = leaves.get("patch_embed/kernel")
    patch_size = max(1, patch_shape[-1]) if patch_shape else family.patch_size
    positions = leaves.get("pos_embed", ())
    grid = family.image_size // family.patch_size
    rows = positions[-2] if len(positions) > 1 else 1 + grid**2
    registers = leaves.get("register_tokens", ())
    num_registers = registers[-2] if len(registers) > 1 else len(registers)
    folded = layout == "timm" and num_registers > 0
    swiglu = any("/mlp/w" in path for path in leaves)
    if layout == "timm":
        swiglu = _is_packed(seen)
    return {
        "embed_dim": _width(layout, leaves, seen),
        "depth": _depth(seen),
        "ffn_layer": "swiglu" if swiglu else "mlp",
        "img_size": max(1, math.isqrt(max(0, rows - (not folded)))) * patch_size,
        "patch_size": patch_size,
        "num_register_tokens": num_registers,
    }


def _by_leaf(layout: str, seen: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shape of a tensor of each leaf that is there, of its first block."""
    found: dict[str, Shape] = {}
    for row in layouts.LAYOUTS[layout].rows:
        shape = seen.get(row.key.replace("{i}", "0"))
        if shape is not None:
            found.setdefault(row.path, shape)
    return found


def _width(layout: str, leaves: Mapping[str, Shape], seen: Mapping[str, Shape]) -> int:
    """Most common last axis of the tensors that end in it: one may be misshapen."""
    widths = Counter(leaves[path][-1] for path in WIDE if leaves.get(path))
    if not widths:
        rows = layouts.LAYOUTS[layout].rows
        names = [row.key for path in WIDE for row in rows if row.path == path]
        raise ValueError(
            f"no DINOv2 model: none of {', '.join(dict.fromkeys(names))} is there, but "
            f"{listing(sorted(seen), limit=3) or 'nothing'}."
        )
    return widths.most_common(1)[0][0]


def _depth(seen: Mapping[str, Shape]) -> int:
    """Highest block + 1, within reason: a stray name must not ask for 10^9 blocks."""
    found = (re.match(r"(?:blocks|encoder\.layer)\.(\d{1,6})\.", key) for key in seen)
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


# --- Names for messages -----------------------------------------------------------


def listing(names: Sequence[str], limit: int = LISTED) -> str:
    """Names for an error, of many the first."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def describe(config: vit.ViTConfig) -> str:
    """The hub's name of an architecture, or its numbers."""
    return hub_name(config) or (
        f"DINOv2 model of width {config.embed_dim}, {config.depth} blocks, FFN "
        f"{config.ffn_layer}, {config.num_register_tokens} registers, image size "
        f"{config.img_size}"
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
