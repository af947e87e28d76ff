"""What the names and shapes of tensors tell of layout and architecture."""

import dataclasses

import numpy as np
import pytest

import convert
import golden
from convert import infer, layouts
from convert.state_dict import TorchModel
from samples import SMALL, error_of, random_params, random_state
from sinder_jax import param_tree, vit


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", vit.CONFIGS)
def test_hub_architecture_is_inferred_from_its_shapes(name, layout):
    config = vit.CONFIGS[name]
    shapes = {key: slot.shape for key, slot in layouts.table_of(layout, config).items()}
    if layout != "timm":  # which has no mask token and adds up the class token
        total = sum(np.prod(shape) for shape in shapes.values())
        assert total == param_tree.num_params(config)
    # Views of one number: the giant's shapes without the giant's memory.
    state = {
        key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()
    }
    seen = {key: x.shape for key, x in state.items()}
    assert infer.layout_of(seen) == layout
    assert infer.config_from(infer.statements_of(layout, seen)) == config
    assert infer.hub_name(config) == name


@pytest.mark.parametrize("name", vit.CONFIGS)
def test_one_block_of_a_hub_model_comes_back_with_the_same_bytes(name):
    config = dataclasses.replace(vit.CONFIGS[name], depth=1)
    params = random_params(config)
    state = convert.to_torch(config, params)
    inferred, back = convert.from_torch(state)
    assert inferred == config
    flat = param_tree.flatten(back)
    for path, leaf in param_tree.flatten(params).items():
        assert flat[path].tobytes() == leaf.tobytes(), path


def test_hub_names_of_a_block_are_those_published():
    # facebookresearch/dinov2, dinov2_vitg14_reg4_pretrain.pth.
    block = layouts.table_of("dinov2", vit.CONFIGS["dinov2_vitg14_reg"])
    assert {key for key in block if not key.startswith("blocks.")} == {
        "cls_token",
        "pos_embed",
        "register_tokens",
        "mask_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    }
    parts = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"]
    parts += ["attn.proj.weight", "attn.proj.bias", "ls1.gamma", "norm2.weight"]
    parts += ["norm2.bias", "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight"]
    parts += ["mlp.w3.bias", "ls2.gamma"]
    in_block_39 = [key for key in block if key.startswith("blocks.39.")]
    assert sorted(in_block_39) == sorted(f"blocks.39.{part}" for part in parts)


def test_resampling_follows_the_hub_unless_given():
    plain, registers = random_state(SMALL["mlp"]), random_state(SMALL["registers"])

    def resampling(state, **overrides):
        config, _ = convert.from_torch(state, **overrides)
        return config.interpolate_antialias, config.interpolate_offset

    assert resampling(plain) == (False, 0.1)
    assert resampling(registers) == (True, 0.0)
    assert resampling(plain, interpolate_antialias=True) == (True, 0.1)
    assert resampling(registers, interpolate_offset=0.1) == (True, 0.1)


def test_num_heads_is_asked_for_where_64_does_not_divide_the_width():
    arrays, _ = golden.load("gelu")
    state = golden.state(arrays)
    message = error_of(convert.from_torch, state)
    assert "48" in message and "num_heads" in message
    assert convert.from_torch(state, num_heads=4)[0].num_heads == 4
    assert "num_heads=5" in error_of(convert.from_torch, state, num_heads=5)


def test_unknown_override_names_the_nearest():
    state = random_state(SMALL["mlp"])
    message = error_of(convert.from_torch, state, interpolate_antialis=True)
    assert "'interpolate_antialis'" in message and "interpolate_antialias" in message


@pytest.mark.parametrize(
    "overrides",
    [
        {"embed_dim": 64},
        {"depth": 12},
        {"img_size": 518},
        {"num_register_tokens": 4},
        {"ffn_layer": "swiglu"},
    ],
    ids=str,
)
def test_override_that_contradicts_the_tensors_is_refused(overrides):
    state = random_state(SMALL["mlp"])
    assert "contradicts" in error_of(convert.from_torch, state, **overrides)


def test_override_that_repeats_the_tensors_is_accepted():
    assert convert.from_torch(random_state(SMALL["mlp"]), depth=3)[0] == SMALL["mlp"]


@pytest.mark.parametrize(
    "overrides",
    [{"interpolate_antialias": "true"}, {"interpolate_offset": float("nan")}],
    ids=str,
)
def test_override_of_another_kind_is_refused(overrides):
    (name,) = overrides
    assert name in error_of(convert.from_torch, random_state(SMALL["mlp"]), **overrides)


@pytest.mark.parametrize("width", [192, 320, 384, 1024])
def test_heads_are_told_for_dinov2_s_widths_and_for_narrower_models(width):
    state = random_state(vit.ViTConfig(width, 1, width // 64, "mlp", img_size=14))
    model = TorchModel(state)
    assert model.config.num_heads == width // 64
    assert model.statements["num_heads"].words in infer.GUESSES


@pytest.mark.parametrize("width", [448, 512, 1280, 100])
def test_heads_of_any_other_width_are_asked_for(width):
    state = random_state(vit.ViTConfig(width, 1, 4, "mlp", img_size=14))
    message = error_of(convert.from_torch, state)
    assert f"of width {width}" in message and "--num-heads=N" in message
    assert convert.from_torch(state, 4)[0].num_heads == 4
