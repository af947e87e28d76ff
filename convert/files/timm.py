"""timm's config.json: what it says of a model beyond the tensors.

{"architecture", "model_args", "pretrained_cfg"} --statements--> fields of a ViTConfig
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from convert.files.reading import CONFIG
from convert.statements import Statement, Told, integer, number, side, statistics

# Width and heads of timm's architectures, which only their names tell.
HEADS = {"small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}
DINOV2_HEADS = {**HEADS, "giant": (1536, 24)}  # another giant has 16


def is_config(config: Mapping[str, Any]) -> bool:
    """True for a config.json of timm rather than of transformers."""
    model_type = config.get("model_type", "timm_wrapper")  # as transformers saves it
    named = "architecture" in config or "pretrained_cfg" in config
    return named and model_type == "timm_wrapper"


def statements(
    config: Mapping[str, Any], inferred: Mapping[str, Any]
) -> Iterator[Statement]:
    """What a config.json of timm says.

    Args:
      config: the JSON object.
      inferred: the fields of the `ViTConfig` that the tensors determine.

    Raises:
      ValueError: a value of a wrong type, or a model that this program does not
        compute; names the key.
    """
    given = _object(config, "model_args")
    # null is timm's default
    given = {key: value for key, value in given.items() if value is not None}
    args = Told(f"model_args of {CONFIG}", given)
    width, patch = inferred["embed_dim"], inferred["patch_size"]
    packed = 2 if inferred["ffn_layer"] == "swiglu" else 1
    act_layers = ("silu", "swish") if packed == 2 else ("gelu",)
    args.require("in_chans", 3)
    args.require("pos_embed", "learn")
    args.require("act_layer", *act_layers)
    args.require("norm_layer", "layernorm", "LayerNorm")
    args.require("mlp_layer", *(("SwiGLUPacked",) if packed == 2 else ("Mlp",)))
    for key in ("qkv_bias", "proj_bias", "class_token", "final_norm"):
        args.require(key, True)
    for key in ("qk_norm", "pre_norm", "scale_attn_norm", "scale_mlp_norm"):
        args.require(key, False)
    for key in ("attn_layer", "block_fn", "embed_layer", "embed_norm_layer"):
        args.require(key, None)
    yield from args.statements("embed_dim", "embed_dim", integer)
    yield from args.statements("depth", "depth", integer)
    yield from args.statements("num_heads", "num_heads", integer)
    yield from args.statements("patch_size", "patch_size", side)
    yield from args.statements(
        "img_size", "img_size", lambda x: side(x) // patch * patch
    )
    yield from args.statements("reg_tokens", "num_register_tokens", integer)
    yield from args.statements(
        "mlp_ratio", "hidden_width", lambda x: int(width * number(x)) // packed
    )
    if "num_heads" not in given:
        yield from _named(config, width)
    # In old files the keys of pretrained_cfg stand at the top.
    pretrained = Told(CONFIG, _object(config, "pretrained_cfg") or config)
    if any(pretrained.values.get(key) is not None for key in ("mean", "std")):
        yield statistics(pretrained, "mean", "std")


def _named(config: Mapping[str, Any], width: int) -> Iterator[Statement]:
    """The number of heads, where the name of the architecture tells it."""
    name = str(config.get("architecture"))
    if found := re.match(r"vit_(\w+?)_patch\d+_", name):
        known = (DINOV2_HEADS if "dinov2" in name else HEADS).get(found[1], (0, 0))
        if known[0] == width:
            yield Statement("num_heads", known[1], f"architecture={name!r} in {CONFIG}")


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{Told(CONFIG, config).quote(key)}, expected an object")
    return found
