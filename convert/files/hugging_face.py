"""The JSON files beside the weights in a Hugging Face directory."""

from typing import Any

from convert.files.reading import CONFIG, PREPROCESSOR
from sinder_jax import families, vit


def contents(config: vit.ViTConfig) -> dict[str, dict[str, Any]]:
    """The JSON objects that transformers needs to load a model, by file name.

    Returns:
      config.json as of Dinov2Config or Dinov2WithRegistersConfig, and
      preprocessor_config.json as of facebook/dinov2-base, the same for all sizes.
    """
    registers = config.num_register_tokens
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    model = {
        "architectures": [f"{name}Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "use_swiglu_ffn": config.ffn_layer == "swiglu",
        "mlp_ratio": 4,
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
