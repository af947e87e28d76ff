import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import convert
import golden
from convert import infer, layouts
from samples import SMALL, assert_same_bytes, error_of, random_params, random_state
from sinder_jax import param_tree, vit

# --- Round trips and axes ---------------------------------------------------------


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


# --- What the tensors tell --------------------------------------------------------


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
    assert infer.config_of(layout, seen) == config
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


# --- Misfits ----------------------------------------------------------------------


def test_one_error_names_every_misfit():
    state = random_state(SMALL["mlp"])
    del state["norm.bias"], state["blocks.1.ls1.gamma"], state["cls_token"]
    state["head.weight"] = np.ones((2, 3), np.float32)
    state["blocks.2.attn.qkv.weight"] = state["blocks.2.attn.qkv.weight"].T
    state["mask_token"] = state["mask_token"][0]
    state["norm.weight"] = state["norm.weight"].astype(np.int64)
    state["pos_embed"][0, 3, 5] = np.nan
    state["blocks.0.mlp.fc1.bias"][7] = -np.inf
    message = error_of(convert.from_torch, state)
    for part in (
        "3 missing: cls_token, blocks.1.ls1.gamma, norm.bias;",
        "1 surplus: head.weight;",
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


# --- Layouts ----------------------------------------------------------------------


def renamed(state, *replacements):
    for old, new in replacements:
        state = {re.sub(old, new, key): tensor for key, tensor in state.items()}
    return state


def in_memory_of_transformers(state):
    """Files of transformers under the names that its version 5 has in memory."""
    names = [("attention.attention.query", "attention.q_proj")]
    names += [("attention.attention.key", "attention.k_proj")]
    names += [("attention.attention.value", "attention.v_proj")]
    names += [("attention.output.dense", "attention.o_proj")]
    names += [("weights_out", "down_proj")]
    split = {}
    for key, tensor in renamed(state, *names).items():
        if "weights_in" in key:
            gate, up = np.split(tensor, 2)
            split[key.replace("weights_in", "gate_proj")] = gate
            split[key.replace("weights_in", "up_proj")] = up
        else:
            split[key] = tensor
    return split


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("layout", ["dinov2", "hf"])
def test_every_tensor_of_a_layout_comes_back_with_the_same_bytes(layout, kind):
    params = random_params(SMALL[kind])
    state = convert.to_torch(SMALL[kind], params, layout)
    config, back = convert.from_torch(state)
    assert config == SMALL[kind]
    flat, flat_back = param_tree.flatten(params), param_tree.flatten(back)
    assert_same_bytes({path: flat_back[path] for path in flat}, flat)
    assert_same_bytes(convert.to_torch(config, back, layout), state)


@pytest.mark.parametrize("kind", SMALL)
def test_timm_comes_back_with_the_same_bytes(kind):
    params = random_params(SMALL[kind])
    params["pos_embed"][0, 0, :2] = -0.0
    params["cls_token"][0, 0, :2] = [-0.0, 0.0]
    state = convert.to_torch(SMALL[kind], params, "timm")
    config, back = convert.from_torch(state)
    assert config == SMALL[kind]
    assert not np.any(back["mask_token"])
    assert_same_bytes(convert.to_torch(config, back, "timm"), state)


@pytest.mark.parametrize("kind", ["registers", "swiglu-registers"])
def test_timm_with_registers_is_the_same_function(kind):
    config, params = SMALL[kind], random_params(SMALL[kind])
    _, folded = convert.from_torch(convert.to_torch(config, params, "timm"))
    assert np.any(folded["cls_token"] != params["cls_token"])
    side = 2 * config.img_size + config.patch_size
    image = np.random.default_rng(1).random((1, side, config.img_size, 3))
    image = jnp.asarray(image, jnp.float32)
    features = [
        vit.ViT(config).apply({"params": tree}, image) for tree in (params, folded)
    ]
    for got, want in zip(*features, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", SMALL)
def test_the_names_in_the_memory_of_transformers_are_read(kind):
    params = random_params(SMALL[kind])
    state = convert.to_torch(SMALL[kind], params, "hf")
    config, back = convert.from_torch(in_memory_of_transformers(state))
    assert config == SMALL[kind]
    for path, leaf in param_tree.flatten(params).items():
        assert param_tree.flatten(back)[path].tobytes() == leaf.tobytes(), path


def training(state):
    """As a training run of DINOv2 stores it: wrapped, in chunks, beside heads."""
    chunked = renamed(
        state, (r"^blocks\.0\.", "blocks.0.0."), (r"^blocks\.1\.", "blocks.1.1.")
    )
    wrapped = renamed(
        chunked, (r"^blocks\.2\.", "blocks.1.2."), ("^", "teacher.backbone.")
    )
    heads = {"teacher.dino_head.last_layer.weight_g": np.ones((3, 1), np.float32)}
    return wrapped | heads | {"student.backbone.cls_token": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    "wrap",
    [
        training,
        lambda state: renamed(state, ("^", "module.backbone.")),
        lambda state: renamed(state, ("^", "_orig_mod.")),
        lambda state: renamed(state, (r"^blocks\.(\d)", r"blocks.0.\1")),
    ],
    ids=["training", "ddp", "compiled", "chunks"],
)
def test_what_training_wraps_around_the_names_is_stripped(wrap):
    params = random_params(SMALL["mlp"])
    config, back = convert.from_torch(wrap(convert.to_torch(SMALL["mlp"], params)))
    assert config == SMALL["mlp"]
    for path, leaf in param_tree.flatten(params).items():
        assert param_tree.flatten(back)[path].tobytes() == leaf.tobytes(), path


@pytest.mark.parametrize("prefix", ["dinov2", "dinov2_with_registers"])
def test_the_backbone_of_a_classifier_is_read(prefix):
    kind = "registers" if "reg" in prefix else "swiglu"
    params = random_params(SMALL[kind])
    state = renamed(convert.to_torch(SMALL[kind], params, "hf"), ("^", f"{prefix}."))
    state["classifier.weight"] = np.ones((2, 64), np.float32)
    config, back = convert.from_torch(state)
    assert config == SMALL[kind]
    np.testing.assert_array_equal(back["pos_embed"], params["pos_embed"])


def test_two_names_of_one_tensor_are_refused():
    state = random_state(SMALL["mlp"])
    state["blocks.0.2.ls1.gamma"] = state["blocks.2.ls1.gamma"]
    message = error_of(convert.from_torch, state)
    assert "blocks.2.ls1.gamma and blocks.0.2.ls1.gamma are both" in message


def test_a_head_beside_bare_names_is_surplus():
    state = random_state(SMALL["mlp"]) | {"head.weight": np.ones((2, 3), np.float32)}
    assert "1 surplus: head.weight" in error_of(convert.from_torch, state)


def test_a_mixture_of_two_layouts_is_refused():
    state = random_state(SMALL["mlp"])
    state["embeddings.cls_token"] = state.pop("cls_token")
    message = error_of(convert.from_torch, state)
    assert "surplus" in message and "missing" in message


@pytest.mark.parametrize("kind", SMALL)
def test_missing_mask_token_becomes_zeros(kind):
    state = random_state(SMALL[kind])
    del state["mask_token"]
    config, params = convert.from_torch(state)
    assert config == SMALL[kind]
    assert params["mask_token"].shape == (1, config.embed_dim)
    assert not np.any(params["mask_token"])


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "registers"])
def test_the_hubs_modules_load_strictly_what_is_written(kind):
    torch = pytest.importorskip("torch")
    from hub_module import Hub

    config = SMALL[kind]
    state = random_state(config)
    model = Hub(
        config.embed_dim,
        config.depth,
        config.ffn_layer == "swiglu",
        config.num_register_tokens,
        positions=1 + config.grid_size**2,
    )
    tensors = {key: torch.from_numpy(tensor) for key, tensor in state.items()}
    model.load_state_dict(tensors, strict=True)
    assert list(model.state_dict()) == list(state)


# timm 1.0.31: the names and shapes of vit_giant_patch14_reg4_dinov2 and
# vit_small_patch14_dinov2 (created without weights, num_classes=0), block 0 of each.
TIMM_BLOCK = {
    "norm1.weight": "D", "norm1.bias": "D", "attn.qkv.weight": "3D D",
    "attn.qkv.bias": "3D", "attn.proj.weight": "D D", "attn.proj.bias": "D",
    "ls1.gamma": "D", "norm2.weight": "D", "norm2.bias": "D", "mlp.fc1.weight": "F D",
    "mlp.fc1.bias": "F", "mlp.fc2.weight": "D G", "mlp.fc2.bias": "D", "ls2.gamma": "D",
}  # fmt: skip
TIMM_REST = {
    "cls_token": "1 1 D", "pos_embed": "1 P D", "patch_embed.proj.weight": "D 3 14 14",
    "patch_embed.proj.bias": "D", "norm.weight": "D", "norm.bias": "D",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes", "count"),
    [
        ("dinov2_vits14", {"D": 384, "F": 1536, "G": 1536, "P": 1370}, 174),
        ("dinov2_vits14_reg", {"D": 384, "F": 1536, "G": 1536, "P": 1369}, 175),
        ("dinov2_vitg14", {"D": 1536, "F": 8192, "G": 4096, "P": 1370}, 566),
        ("dinov2_vitg14_reg", {"D": 1536, "F": 8192, "G": 4096, "P": 1369}, 567),
    ],
)
def test_names_and_shapes_are_those_of_timm(name, sizes, count):
    config = vit.CONFIGS[name]
    sizes = sizes | {"3D": 3 * sizes["D"]}
    recorded = dict(TIMM_REST)
    if config.num_register_tokens:
        recorded["reg_token"] = "1 4 D"
    for block in range(config.depth):
        recorded |= {f"blocks.{block}.{key}": axes for key, axes in TIMM_BLOCK.items()}
    want = {
        key: tuple(sizes.get(axis) or int(axis) for axis in axes.split())
        for key, axes in recorded.items()
    }
    assert len(want) == count
    table = layouts.table_of("timm", config)
    assert {key: slot.shape for key, slot in table.items()} == want


def test_unknown_layout_lists_the_allowed_ones():
    config = SMALL["mlp"]
    message = error_of(convert.to_torch, config, random_params(config), layout="onnx")
    assert "'onnx'" in message
    assert all(f"'{name}'" in message for name in ("dinov2", "hf", "timm"))
    assert "memory" not in message


def test_params_that_do_not_fit_are_refused_on_the_way_out():
    config, params = SMALL["mlp"], random_params(SMALL["mlp"])
    del params["norm"]["bias"]
    params["head"] = np.ones(3, np.float32)
    params["cls_token"] = params["cls_token"][0]
    message = error_of(convert.to_torch, config, params)
    for path in ("norm/bias", "head", "cls_token"):
        assert path in message
