"""timm's config.json: what it says of a model beyond the tensors.

{"architecture", "model_args", "pretrained_cfg"} --statements--> fields of a ViTConfig
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from convert.files.reading import CONFIG
from convert.statements import (
    Statement,
    Told,
    integer,
    number,
    side,
    statistics,
    truth,
)

# Width and heads of timm's architectures, which only their names tell.
SIZES = {
    "tiny": (192, 3),
    "small": (384, 6),
    "base": (768, 12),
    "large": (1024, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "gigantic": (1664, 16),
    "giant dinov2": (1536, 24),
}
# Arguments of timm's VisionTransformer that change no token of an image whose sides are
# multiples of the patch.
IDLE = """num_classes global_pool fc_norm pool_include_prefix dynamic_img_size
    dynamic_img_pad strict_img_size drop_rate pos_drop_rate patch_drop_rate
    proj_drop_rate attn_drop_rate drop_path_rate weight_init fix_init""".split()
READ = """embed_dim depth num_heads patch_size img_size reg_tokens mlp_ratio init_values
    no_embed_class act_layer norm_layer mlp_layer""".split()
FIXED = {
    **dict.fromkeys(("qkv_bias", "proj_bias", "class_token", "final_norm"), True),
    **dict.fromkeys(("qk_norm", "pre_norm"), False),
    **dict.fromkeys(("scale_attn_norm", "scale_mlp_norm"), False),
    **dict.fromkeys(("attn_layer", "block_fn", "embed_layer", "embed_norm_layer")),
    "in_chans": 3,
    "pos_embed": "learn",
}


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
    for key, value in FIXED.items():
        args.require(key, value)
    args.require("act_layer", *act_layers)
    args.require("norm_layer", "layernorm", "LayerNorm")
    args.require("mlp_layer", "SwiGLUPacked" if packed == 2 else "Mlp")
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
    yield from args.statements("init_values", "layer_scale", lambda x: number(x) > 0)
    read = {*FIXED, *IDLE, *READ}
    if unknown := [key for key in given if key not in read]:
        raise ValueError(
            f"{args.quote(unknown[0])}, which may make another function than this "
            "program computes; remove the key if it does not"
        )
    yield from _named(config, given)
    # In old files the keys of pretrained_cfg stand at the top.
    pretrained = Told(CONFIG, _object(config, "pretrained_cfg") or config)
    if any(pretrained.values.get(key) is not None for key in ("mean", "std")):
        yield statistics(pretrained, "mean", "std")


def embeds_class(contents: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """True if the class token has a position embedding, by a config.json of timm.

    Raises:
      ValueError: the key is neither true nor false.
    """
    config = contents.get(CONFIG, {})
    if not is_config(config):
        return None
    args = Told(f"model_args of {CONFIG}", _object(config, "model_args"))
    if args.values.get("no_embed_class") is None:
        return None
    return not args.read("no_embed_class", truth)


def _named(config: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Statement]:
    """What the name of the architecture tells, unless `model_args` replace it."""
    name = str(config.get("architecture"))
    found = re.match(r"vit_([a-z]+)_patch(\d+)_(?:reg(\d+)_)?", name)
    if not found:
        return
    told: dict[str, tuple[str, Any]] = {"patch_size": ("patch_size", int(found[2]))}
    if found[3]:
        told["reg_tokens"] = ("num_register_tokens", int(found[3]))
    dinov2 = "dinov2" in name
    if dinov2:
        told["init_values"] = ("layer_scale", True)
    giant = " dinov2" if dinov2 and found[1] == "giant" else ""
    if size := SIZES.get(found[1] + giant):
        told["embed_dim"] = ("embed_dim", size[0])
        told["num_heads"] = ("num_heads", size[1])
    for key, (field, value) in told.items():
        if key not in given:
            yield Statement(field, value, f"architecture={name!r} in {CONFIG}")


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{Told(CONFIG, config).quote(key)}, expected an object")
    return found
