"""The JSON files beside the weights in a Hugging Face directory, in both directions.

config.json, preprocessor_config.json --statements--> fields of a ViTConfig
                                      `-extras--> the keys that are no fields
ViTConfig, extras --contents--> config.json, preprocessor_config.json
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from convert.files import timm
from convert.files.reading import CONFIG, PREPROCESSOR
from convert.statements import (
    Statement,
    Told,
    finite,
    integer,
    number,
    side,
    statistics,
    truth,
)
from sinder_jax import families, vit

Contents = Mapping[str, Mapping[str, Any]]  # JSON objects by file name

TYPES = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
DEFAULT_HEADS = 12  # of Dinov2Config
PROCESSING = {"image_mean", "image_std", "image_processor_type"}
# The keys that a ViTConfig determines, by file.
FIELDS = {
    CONFIG: """architectures model_type hidden_size num_hidden_layers
        num_attention_heads image_size patch_size use_swiglu_ffn mlp_ratio
        layer_norm_eps num_register_tokens torch_dtype head_dim""".split(),
    PREPROCESSOR: ["image_mean", "image_std"],
}


# --- Reading ----------------------------------------------------------------------


def statements(
    contents: Contents, inferred: Mapping[str, Any], *, has_mask_token: bool
) -> Iterator[Statement]:
    """What the JSON files beside the tensors say, those of timm included.

    Args:
      contents: the JSON objects, as far as there are any.
      inferred: the fields of the `ViTConfig` that the tensors determine.
      has_mask_token: whether one of the tensors is the mask token.

    Raises:
      ValueError: a value of a wrong type, or a model that this program does not
        compute; names file and key.
    """
    config = contents.get(CONFIG, {})
    if timm.is_config(config):
        yield from timm.statements(config, inferred)
    else:
        config, name = _backbone(config)
        yield from _config_statements(Told(name, config), inferred, has_mask_token)
    yield from _preprocessor_statements(contents)


def _backbone(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What describes a backbone, also inside DepthAnything and the like, and where."""
    inside = config.get("backbone_config")
    if isinstance(inside, dict) and inside.get("model_type") in TYPES:
        return inside, f"backbone_config of {CONFIG}"
    return config, CONFIG


def _config_statements(
    config: Told, inferred: Mapping[str, Any], has_mask_token: bool
) -> Iterator[Statement]:
    width, ffn_layer = inferred["embed_dim"], inferred["ffn_layer"]
    patch = inferred["patch_size"]
    config.require("model_type", *TYPES)
    config.require("num_channels", 3)
    config.require("qkv_bias", True)
    if ffn_layer == "mlp":
        config.require("hidden_act", "gelu")
    if has_mask_token:
        config.require("use_mask_token", True)
    yield from config.statements("hidden_size", "embed_dim", integer)
    yield from config.statements("num_hidden_layers", "depth", integer)
    yield from config.statements("num_attention_heads", "num_heads", integer)
    told = "num_attention_heads" in config.values or "hidden_size" not in config.values
    if not told and width % DEFAULT_HEADS == 0:
        words = f"no num_attention_heads in {CONFIG}, for which transformers takes"
        yield Statement("num_heads", DEFAULT_HEADS, f"{words} {DEFAULT_HEADS}")
    yield from config.statements("head_dim", "num_heads", lambda x: width // side(x))
    yield from config.statements("patch_size", "patch_size", side)
    yield from config.statements(
        "image_size", "img_size", lambda x: side(x) // patch * patch
    )
    yield from config.statements(
        "use_swiglu_ffn", "ffn_layer", lambda x: "swiglu" if truth(x) else "mlp"
    )
    yield from config.statements(
        "mlp_ratio", "hidden_width", lambda x: _hidden(width, number(x), ffn_layer)
    )
    yield from config.statements("layer_norm_eps", "norm_epsilon", number)
    if config.values.get("model_type") == "dinov2":
        yield from config.statements("model_type", "num_register_tokens", lambda _: 0)
    else:
        yield from config.statements(
            "num_register_tokens", "num_register_tokens", integer
        )


def _preprocessor_statements(contents: Contents) -> Iterator[Statement]:
    told = Told(PREPROCESSOR, contents.get(PREPROCESSOR, {}))
    for key in ("do_normalize", "do_rescale"):
        told.require(key, True)
    for key in ("do_flip_channel_order", "do_grayscale", "offset", "rescale_offset"):
        told.require(key, False, None)
    if "rescale_factor" in told.values:
        factor = told.read("rescale_factor", number)
        if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            raise ValueError(f"{told.quote('rescale_factor')}, expected 1/255")
    # A processor that is named has statistics of its own where the file has none.
    if PROCESSING & told.values.keys():
        yield statistics(told, "image_mean", "image_std")


def _hidden(width: int, ratio: float | int, ffn_layer: str) -> int:
    """FFN width F as Dinov2MLP and Dinov2SwiGLUFFN compute it."""
    hidden = int(width * ratio)
    return hidden if ffn_layer == "mlp" else (int(hidden * 2 / 3) + 7) // 8 * 8


def extras(contents: Contents) -> dict[str, dict[str, Any]]:
    """The keys that no `ViTConfig` holds and that are not as in DINOv2's own files.

    Of a preprocessor all of them, if any differs or is lacking: what is not there means
    the default of its image processor.

    Raises:
      ValueError: NaN or infinity, which no checkpoint can store; names file and key.
    """
    if timm.is_config(contents.get(CONFIG, {})):
        return {}
    usual, found = _usual(vit.CONFIGS["dinov2_vits14"]), {}
    config, _ = _backbone(contents.get(CONFIG, {}))
    contents = {**contents, CONFIG: config}
    for name, values in contents.items():
        told = Told(name, values)
        rest = {
            key: told.read(key, finite) for key in values if key not in FIELDS[name]
        }
        dinov2 = {key: usual[name][key] for key in usual[name].keys() - FIELDS[name]}
        if name == CONFIG:
            rest = {k: value for k, value in rest.items() if value != dinov2.get(k)}
        found[name] = {} if rest == dinov2 else rest
    return {name: values for name, values in found.items() if values}


# --- Writing ----------------------------------------------------------------------


def wants_mask_token(provenance: Mapping[str, Any]) -> bool:
    """False for a model whose config.json said that it has none."""
    extras = provenance.get("contents", {}).get(CONFIG, {})
    return extras.get("use_mask_token", True) is not False


def contents(
    config: vit.ViTConfig, extras: Contents | None = None
) -> dict[str, dict[str, Any]]:
    """The JSON objects that transformers needs to load a model, by file name.

    Args:
      config: the architecture.
      extras: further keys, see the function `extras`.

    Returns:
      config.json as of Dinov2Config or Dinov2WithRegistersConfig, and
      preprocessor_config.json as of facebook/dinov2-base, the same for all sizes.

    Raises:
      ValueError: an FFN width that no config.json can say.
    """
    made = _usual(config)
    for name, fields in FIELDS.items():
        own = (extras or {}).get(name, {})
        if own and name == PREPROCESSOR:
            made[name] = {key: made[name][key] for key in fields}
        for key, value in own.items():
            if key not in fields:
                made[name][key] = "float32" if key == "dtype" else value
    return made


def _usual(config: vit.ViTConfig) -> dict[str, dict[str, Any]]:
    registers = config.num_register_tokens
    model_type = "dinov2_with_registers" if registers else "dinov2"
    model = {
        "architectures": [f"{TYPES[model_type]}Model"],
        "model_type": model_type,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "use_swiglu_ffn": config.ffn_layer == "swiglu",
        "mlp_ratio": _mlp_ratio(config),
        "hidden_act": "gelu",
        "layer_norm_eps": families.of(config).norm_epsilon,
        "qkv_bias": True,
        "num_channels": 3,
        "layerscale_value": 1.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    if registers:
        model["num_register_tokens"] = registers
    mean, std = families.of(config).statistics
    preprocessor = {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_processor_type": "BitImageProcessor",
        "image_std": list(std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 256},
    }
    return {CONFIG: model, PREPROCESSOR: preprocessor}


def _mlp_ratio(config: vit.ViTConfig) -> float | int:
    """The ratio of which transformers makes the FFN's width: whole where possible."""
    width, hidden, ffn_layer = config.embed_dim, config.hidden_dim, config.ffn_layer
    exact = hidden / width * (1 if ffn_layer == "mlp" else 1.5)
    for ratio in (math.floor(exact), math.ceil(exact), exact, exact + 1e-9):
        if _hidden(width, ratio, ffn_layer) == hidden:
            return ratio
    raise ValueError(
        f"the FFN is {hidden} wide, and no mlp_ratio makes that of {width}: use the "
        "layout dinov2 or timm"
    )
