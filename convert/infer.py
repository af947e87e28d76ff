"""Which layout and which architecture the tensors of a state dict have.

    names and shapes --backbone_keys--> names of a bare DINOv2 --layout_of--> "hf", ...
    and the files beside them --statements_of--> fields of a ViTConfig, who says each
    --config_from--> ViTConfig, from which a whole table is made and compared

Of the tensors only names and shapes are used; the numbers may still be in a file.
"""

import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from convert import layouts
from convert.files import hugging_face, timm
from convert.statements import RESAMPLING, Statement, settle, statement
from sinder_jax import families, vit
from sinder_jax.model import differences

Shape = tuple[int, ...]
DEFAULT_FAMILY = families.named(families.DEFAULT)
# Where nothing tells the number of heads. Of models narrower than any DINOv2 only those
# for tests are known, and timm's smallest, and all of them have heads of 64.
HEAD_WIDTH = 64
NARROWEST = min(size.embed_dim for size in DEFAULT_FAMILY.sizes.values())
USUAL_HEADS = "as many as in DINOv2's model of this width, for no file tells it"
NARROW_HEADS = "64 wide like DINOv2's, for no file tells their number"
GUESSES = (USUAL_HEADS, NARROW_HEADS)
LISTED = 20  # names of one kind in an error; a wrong file misses hundreds

# Names by which a backbone is found inside another model: whatever comes before them is
# its prefix. Beside a prefix anything else is a head, a decoder or a loss.
ANCHORS = [
    row.key
    for layout in layouts.LAYOUTS.values()
    for row in layout.rows
    if "{i}" not in row.key and "norm" not in row.key
]
TEACHER = "teacher"  # of two backbones trained together, the one that is published
# First parts of names beside those of a backbone, with the same prefix or none, that
# read its tokens and do not change them. Anything else may be a part of the backbone
# that this program does not compute.
HEADS = re.compile(
    r"(\w*heads?|\w*classifier|decode\w*|fc|logit\w*|linear\w*|neck|attn_pool"
    r"|projector|prototypes|\w*loss|(pixel_|image_)?(mean|std))\d*(\.|$)"
)
# What wraps single modules: activation checkpointing, FSDP, torch.compile.
WRAPPER = re.compile(r"\b_(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod)\.")
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")  # chunk, block: FSDP training
# Leaves whose last axis is the model's width; several, since any may be misshapen.
TOKENS = ("cls_token", "pos_embed", "mask_token")
WIDE = (*TOKENS, "patch_embed/bias", "norm/scale", "norm/bias")


def backbone_keys(
    names: Sequence[str], prefix: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """Finds the names of a backbone, and strips what is wrapped around them.

    Args:
      names: of all tensors.
      prefix: of the backbone's names, such as "pretrained."; None finds it.

    Returns:
      Bare name -> name in the state dict, for the tensors of a bare DINOv2; and the
      names that are not part of it, such as those of heads and decoders.

    Raises:
      ValueError: no name has the prefix, several backbones and no prefix, or two names
        mean the same tensor.
    """
    keys = _renamed({name: name for name in names}, WRAPPER, "")
    start = _prefix(keys, prefix)
    bare = {
        key.removeprefix(start): name
        for key, name in keys.items()
        if key.startswith(start) and not HEADS.match(key.removeprefix(start))
    }
    bare = bare or keys  # heads alone: named as what they are
    inside = set(bare.values())
    left_out = [name for name in names if name not in inside]
    return _renamed(bare, CHUNKED, r"blocks.\1."), left_out


def _prefix(keys: Mapping[str, str], given: str | None) -> str:
    """The prefix of the backbone: the one given, or the one whose tensors are there."""
    found: dict[str, list[str]] = {}
    for key in keys:
        ends = [x for x in ANCHORS if key == x or key.endswith(f".{x}")]
        if ends:
            anchor = max(ends, key=len)
            found.setdefault(key.removesuffix(anchor), []).append(anchor)
    whole = {x for x, anchors in found.items() if any("patch" in y for y in anchors)}
    shown = " or ".join(sorted(repr(x) for x in whole)) or "none"
    if given is not None:
        start = f"{given.rstrip('.')}." if given else ""
        if not any(key.startswith(start) for key in keys):
            raise ValueError(
                f"got prefix {given!r}, and no tensor has it; found {shown}"
            )
        return start
    if len(whole) > 1:
        teachers = {x for x in whole if TEACHER in x.split(".")}
        whole = teachers if len(teachers) == 1 else whole
    if len(whole) > 1:
        raise ValueError(
            f"holds {len(whole)} backbones, with the prefixes {shown}; choose one by "
            "--prefix=PREFIX"
        )
    return max(whole or found or [""], key=lambda x: len(found.get(x, [])))


def _renamed(
    keys: Mapping[str, str], pattern: re.Pattern[str], by: str
) -> dict[str, str]:
    bare: dict[str, str] = {}
    for key, name in keys.items():
        key = pattern.sub(by, key)
        if key in bare:
            raise ValueError(f"{bare[key]} and {name} are both {key}")
        bare[key] = name
    return bare


# --- Layout -----------------------------------------------------------------------


def layout_of(seen: Mapping[str, Shape]) -> str:
    """The layout of a bare state dict, a key of `layouts.LAYOUTS`.

    A small, base or large model in timm's layout differs from the hub's only by its
    missing mask token; a model without one counts as timm's.

    Args:
      seen: shapes by bare name.
    """
    if any(re.match(r"(encoder\.layer|embeddings)\.", key) for key in seen):
        memory = any(re.search(r"\.([qkvo]|gate|up|down)_proj\.", key) for key in seen)
        return "hf-memory" if memory else "hf"
    if "reg_token" in seen or _is_packed(seen) or _is_folded(seen):
        return "timm"
    own = ("register_tokens", "mask_token")
    swiglu = any(".mlp.w" in key for key in seen)
    return "dinov2" if swiglu or any(key in seen for key in own) else "timm"


def _is_packed(seen: Mapping[str, Shape]) -> bool:
    """True if fc1 makes gate and value of a SwiGLU at once, as in most blocks."""
    # From all blocks, since a single tensor may be missing or misshapen.
    votes = []
    for key, up in seen.items():
        down = seen.get(key.replace(".fc1.", ".fc2."), ())
        if key.endswith(".mlp.fc1.weight") and len(up) == len(down) == 2:
            votes.append(up[0] == 2 * down[1])
    return bool(votes) and 2 * sum(votes) >= len(votes)


def _is_folded(seen: Mapping[str, Shape]) -> bool:
    """True if the position embedding lacks the row of the class token."""
    rows = seen.get("pos_embed", ())[1:2]
    return bool(rows) and rows[0] > 1 and _is_square(rows[0])


def _is_square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


# --- Architecture -----------------------------------------------------------------


def config_from(statements: Mapping[str, Statement]) -> vit.ViTConfig:
    """The config whose fields were stated; with one head if nothing tells how many."""
    values = {name: statement.value for name, statement in statements.items()}
    return vit.ViTConfig(**({"num_heads": 1} | values))


def check_heads(statements: Mapping[str, Statement]) -> None:
    """Raises ValueError if nothing tells the number of heads."""
    if "num_heads" not in statements:
        raise ValueError(
            "nothing tells the number of attention heads of a model of width "
            f"{statements['embed_dim'].value}, which is none of DINOv2's; pass "
            "num_heads "
            "(python -m convert to-jax SRC DST --num-heads=N)"
        )


def statements_of(
    layout: str,
    seen: Mapping[str, Shape],
    num_heads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    contents: hugging_face.Contents | None = None,
    stated: Sequence[Statement] = (),
) -> dict[str, Statement]:
    """The fields of the architecture closest to a state dict, and who says each.

    What a missing or misshapen tensor would tell is taken from others or from the hub
    models, so that the comparison with the whole table can name the tensor.

    Args:
      layout: from `layout_of`.
      seen: shapes by bare name.
      num_heads: None: what the files say, or that of the family's model of this width,
        or heads of 64 in a model narrower than all of them; else there is no statement.
      overrides: fields of `vit.ViTConfig` that tensors do not determine.
      contents: the JSON objects of the files beside the tensors, by file name.
      stated: what the file of the tensors says itself.

    Raises:
      ValueError: no tensor determines the width; an unknown override; a file that
        describes a model which this program does not compute; or two statements that
        contradict each other.
    """
    overrides = dict(overrides or {})
    _check_overrides(overrides)
    if num_heads is not None:
        overrides["num_heads"] = num_heads
    arguments = [statement(*item, "the arguments") for item in overrides.items()]
    family = DEFAULT_FAMILY
    embeds_class = timm.embeds_class(contents or {})
    for one in (*stated, *arguments):
        if one.field == "family":
            family = families.named(one.value)
        if one.field == "positions" and one.value != "class":
            embeds_class = one.value == "all"
    inferred = _inferred(layout, seen, family, embeds_class)
    variant = family.variant(inferred["num_register_tokens"])
    beside = hugging_face.statements(
        contents or {},
        inferred,
        has_mask_token=any("mask_token" in key for key in seen),
    )
    settled = settle(
        [
            *(
                statement(*x, "the tensors")
                for x in inferred.items()
                if x[1] is not None
            ),
            *(
                statement(name, getattr(variant, name), "the hub")
                for name in RESAMPLING
            ),
            *beside,
            *stated,
            *arguments,
        ]
    )
    if "num_heads" not in settled and (usual := _usual_heads(family, inferred)):
        settled["num_heads"] = usual
    return settled


def _usual_heads(
    family: families.Family, inferred: Mapping[str, Any]
) -> Statement | None:
    """The heads of the family's model of this width, or of a model for tests."""
    width = inferred["embed_dim"]
    if heads := family.num_heads(width):
        return Statement("num_heads", heads, USUAL_HEADS)
    if width < NARROWEST and width % HEAD_WIDTH == 0:
        return Statement("num_heads", width // HEAD_WIDTH, NARROW_HEADS)
    return None


def _inferred(
    layout: str,
    seen: Mapping[str, Shape],
    family: families.Family,
    embeds_class: bool | None,
) -> dict[str, Any]:
    """The fields of the config that the tensors determine."""
    rows = layouts.LAYOUTS[layout].rows
    leaves: dict[str, Shape] = {}  # shape of a tensor of each leaf, of block 0
    for row in rows:
        shape = seen.get(row.key.replace("{i}", "0"))
        if shape is not None:
            leaves.setdefault(row.path, shape)
    widths = Counter(leaves[path][-1] for path in WIDE if leaves.get(path))
    if not widths:
        names = [row.key for path in WIDE for row in rows if row.path == path]
        raise ValueError(
            f"not a DINOv2 model: got {listing(sorted(seen), limit=3) or 'no tensor'}, "
            f"expected any of {', '.join(dict.fromkeys(names))}"
        )
    patch_shape = leaves.get("patch_embed/kernel")
    patch_size = max(1, patch_shape[-1]) if patch_shape else family.patch_size
    positions = leaves.get("pos_embed", ())
    grid = family.image_size // family.patch_size
    num_positions = positions[-2] if len(positions) > 1 else 1 + grid**2
    registers = leaves.get("register_tokens", ())
    num_registers = registers[-2] if len(registers) > 1 else len(registers)
    where = "class"
    if layout == "timm":
        where = _positions(num_positions, num_registers, embeds_class)
    if where != "patches":  # the class token's, and the registers'
        num_positions -= 1 + num_registers * (where == "all")
    swiglu = any("/mlp/w" in path for path in leaves)
    if layout == "timm":
        swiglu = _is_packed(seen)
    scaled = any(re.search(r"\.ls[12]\.gamma$", key) for key in seen)
    return {
        "embed_dim": widths.most_common(1)[0][0],
        "depth": _depth(seen),
        "ffn_layer": "swiglu" if swiglu else "mlp",
        "img_size": max(1, math.isqrt(max(0, num_positions))) * patch_size,
        "patch_size": patch_size,
        "num_register_tokens": num_registers,
        "hidden_width": _hidden_width(seen, swiglu),
        "layer_scale": None if layouts.LAYOUTS[layout].layer_scale else scaled,
        "positions": where if where == "all" or not num_registers else "class",
    }


def _positions(rows: int, registers: int, embeds_class: bool | None) -> str:
    """Which tokens have a row of a position embedding in timm's layout.

    Without registers a grid of patches alone is taken for a misshapen one unless
    config.json says so, since no published model has it.
    """
    if embeds_class is None:
        embeds_class = not (registers and _is_square(rows))
    return ("all" if registers else "class") if embeds_class else "patches"


def _hidden_width(seen: Mapping[str, Shape], swiglu: bool) -> int | None:
    """FFN width by most of the FFN's tensors, since any may be misshapen."""
    votes: Counter[int] = Counter()
    for key, shape in seen.items():
        if re.search(r"\.mlp\.(fc2|w3|weights_out|down_proj)\.weight$", key):
            votes.update(shape[1:])
        elif re.search(r"\.mlp\.(fc1|w12|weights_in)\.(weight|bias)$", key):
            votes.update(side // (2 if swiglu else 1) for side in shape[:1])
        elif re.search(r"\.mlp\.(gate|up)_proj\.(weight|bias)$", key):
            votes.update(shape[:1])
    return max(votes, key=votes.__getitem__) if votes else None


def _depth(seen: Mapping[str, Shape]) -> int:
    """Highest block + 1, within reason: a stray name must not ask for 10^9 blocks."""
    found = (re.match(r"(?:blocks|encoder\.layer)\.(\d{1,6})\.", key) for key in seen)
    blocks = {int(match[1]) for match in found if match}
    return max(1, min(max(blocks, default=0) + 1, 2 * len(blocks)))


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(vit.ViTConfig)]
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known) or RESAMPLING
            raise ValueError(
                f"unknown option {name!r}; did you mean {' or '.join(near)}?"
            )
    antialias = overrides.get("interpolate_antialias", False)
    if not isinstance(antialias, bool):
        raise ValueError(
            f"got interpolate_antialias={antialias!r}, expected True or False"
        )
    offset = overrides.get("interpolate_offset", 0.0)
    if not (isinstance(offset, int | float) and math.isfinite(offset) and offset >= 0):
        raise ValueError(
            f"got interpolate_offset={offset!r}, expected a number of at least 0"
        )


# --- Names for messages -----------------------------------------------------------


def listing(names: Sequence[str], limit: int = LISTED) -> str:
    """Names for an error, only the first of many."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def listing_by_kind(names: Mapping[str, Sequence[str]], limit: int = LISTED) -> str:
    """Names for an error by what is wrong: "2 missing: a, b; 1 surplus: c"."""
    return "; ".join(
        f"{len(of_kind)} {kind}: {listing(of_kind, limit)}"
        for kind, of_kind in names.items()
    )


def describe(config: vit.ViTConfig) -> str:
    """The hub's name of an architecture, or its numbers."""
    return hub_name(config) or (
        f"DINOv2 model of width {config.embed_dim}, {config.depth} blocks, FFN "
        f"{config.ffn_layer}, {config.num_register_tokens} registers, image size "
        f"{config.img_size}"
    )


def same_shapes(config: vit.ViTConfig) -> list[str]:
    """Names of all published models with this architecture, DINOv2's first."""
    relatives = [
        name
        for name, relative in families.RELATIVES.items()
        if not differences(vit.ViTConfig(**relative.fields), config)
    ]
    hub = hub_name(config)
    return ([hub] if hub else []) + relatives


def hub_name(config: vit.ViTConfig) -> str | None:
    """Name of the hub model with this architecture, however it resamples."""
    same = (name for name, hub in vit.CONFIGS.items() if not differences(hub, config))
    return next(same, None)
