"""from_torch and to_torch: round trips, and every misfit by name."""

import re

import numpy as np
import pytest

import convert
import golden
from convert import layouts
from samples import SMALL, assert_same_bytes, error_of, random_params, random_state
from sinder_jax import param_tree, vit


@pytest.mark.parametrize("kind", SMALL)
def test_params_come_back_with_the_same_bytes(kind):
    params = random_params(SMALL[kind])
    config, back = convert.from_torch(convert.to_torch(SMALL[kind], params))
    assert config == SMALL[kind]
    flat, flat_back = param_tree.flatten(params), param_tree.flatten(back)
    assert_same_bytes({path: flat_back[path] for path in flat}, flat)
    assert all(type(leaf) is np.ndarray for leaf in flat_back.values())


@pytest.mark.parametrize("name", golden.NAMES)
def test_recorded_state_dicts_come_back_in_order_with_the_same_bytes(name):
    arrays, meta = golden.load(name)
    state = golden.state(arrays)
    config, params = convert.from_torch(state, num_heads=meta["num_heads"])
    # The whole of it: a tensor left out, mask_token first of all, would show here.
    assert_same_bytes(convert.to_torch(config, params), state)


def leaf_of(params, key):
    """The part of the params that a PyTorch name means, found without the table."""
    if key == "patch_embed.proj.weight":  # [D, 3, y, x]
        return np.transpose(params["patch_embed"]["kernel"], (3, 2, 0, 1))
    *parents, last = key.replace("patch_embed.proj", "patch_embed").split(".")
    node, block = params, None
    for parent in parents:
        if parent.isdigit():
            block = int(parent)
        else:
            node = node[parent]
    if last == "weight":
        last = "scale" if "norm" in parents[-1] else "kernel"
    leaf = node[last] if block is None else node[last][block]
    return leaf.T if last == "kernel" else leaf


@pytest.mark.parametrize("name", ["swiglu", "gelu", "registers"])
def test_recorded_tensors_land_where_their_names_say(name):
    arrays, meta = golden.load(name)
    state = golden.state(arrays)
    _, params = convert.from_torch(state, num_heads=meta["num_heads"])
    for key, tensor in state.items():
        np.testing.assert_array_equal(leaf_of(params, key), tensor, err_msg=key)


@pytest.mark.parametrize("direction", ["from_torch", "to_torch"])
def test_result_shares_no_memory_with_the_input(direction):
    config = SMALL["mlp"]
    params = random_params(config)
    state = convert.to_torch(config, params)
    if direction == "from_torch":
        source, (_, tree) = state, convert.from_torch(state)
        result = param_tree.flatten(tree)
    else:
        source, result = param_tree.flatten(params), state
    for x in source.values():
        assert not any(np.shares_memory(x, y) for y in result.values())


@pytest.mark.parametrize("number_format", ["float16", "bfloat16", "float64"])
def test_other_float_formats_become_float32(number_format):
    config, params = SMALL["mlp"], random_params(SMALL["mlp"])
    state = {
        key: array.astype(np.dtype(number_format))
        for key, array in convert.to_torch(config, params).items()
    }
    want = {key: array.astype(np.float32) for key, array in state.items()}
    assert_same_bytes(convert.to_torch(*convert.from_torch(state)), want)


# --- Misfits ------------------------------------------------------------------


def test_one_error_names_every_misfit():
    state = random_state(SMALL["mlp"])
    del state["norm.bias"], state["blocks.1.ls1.gamma"], state["cls_token"]
    state["norm_pre.weight"] = np.ones((2, 3), np.float32)
    state["blocks.2.attn.qkv.weight"] = state["blocks.2.attn.qkv.weight"].T
    state["mask_token"] = state["mask_token"][0]
    state["norm.weight"] = state["norm.weight"].astype(np.int64)
    state["pos_embed"][0, 3, 5] = np.nan
    state["blocks.0.mlp.fc1.bias"][7] = -np.inf
    message = error_of(convert.from_torch, state)
    for part in (
        "3 missing: cls_token, blocks.1.ls1.gamma, norm.bias;",
        "1 surplus: norm_pre.weight;",
        "2 misshapen: mask_token is (128,), not (1, 128), ",
        "blocks.2.attn.qkv.weight is (128, 384), not (384, 128);",
        "norm.weight (int64)",
        "2 with NaN or infinity (as float32): pos_embed, blocks.0.mlp.fc1.bias",
    ):
        assert part in message


@pytest.mark.parametrize("layout", layouts.WRITTEN)
@pytest.mark.parametrize("kind", ["swiglu", "registers"])
def test_any_single_missing_tensor_is_named(kind, layout):
    state = convert.to_torch(SMALL[kind], random_params(SMALL[kind]), layout)
    for key in state:
        rest = {name: tensor for name, tensor in state.items() if name != key}
        if "mask_token" in key:
            convert.from_torch(rest)
        elif "reg" in key:
            if layout == "timm":  # else the rest is a whole model without registers
                assert "pos_embed is" in error_of(convert.from_torch, rest)
        else:
            assert error_of(convert.from_torch, rest).endswith(f"1 missing: {key}")


def test_a_long_list_of_misfits_is_cut():
    state = random_state(vit.ViTConfig(64, 12, 1, "mlp", img_size=28))
    state = {key: array for key, array in state.items() if "norm1" not in key}
    message = error_of(convert.from_torch, state)
    assert "24 missing: " in message and " and 4 more" in message
    assert len(re.findall(r"blocks\.\d+\.norm1", message)) == 20


def test_float64_beyond_float32_is_named():
    state = random_state(SMALL["mlp"])
    state["norm.bias"] = np.full(128, 1e300)
    message = error_of(convert.from_torch, state)
    assert "1 with NaN or infinity (as float32): norm.bias" in message


def test_a_stray_block_number_asks_for_no_memory():
    state = random_state(SMALL["mlp"])
    state["blocks.999999.ls1.gamma"] = np.ones(128, np.float32)
    assert "surplus: blocks.999999.ls1.gamma" in error_of(convert.from_torch, state)


def test_something_else_than_a_vision_transformer_is_refused():
    state = {"fc.weight": np.ones((2, 2), np.float32)}
    message = error_of(convert.from_torch, state)
    assert "not a DINOv2 model" in message and "fc.weight" in message
