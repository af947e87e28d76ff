"""Every layout comes back with the same bytes, under the names of its library."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import layouts
from convert.state_dict import TorchModel
from samples import SMALL, assert_same_bytes, error_of, random_params, random_state
from sinder_jax import param_tree, vit


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


@pytest.mark.parametrize(
    "name", ["norm_pre.weight", "dist_token", "blocks.0.ls3.gamma"]
)
def test_what_may_be_a_part_of_the_backbone_is_surplus(name):
    state = random_state(SMALL["mlp"]) | {name: np.ones((2, 3), np.float32)}
    assert f"1 surplus: {name}" in error_of(convert.from_torch, state)


@pytest.mark.parametrize("name", ["head.weight", "classifier.0.bias", "pixel_mean"])
def test_a_head_beside_bare_names_is_left_out(name):
    state = random_state(SMALL["mlp"])
    model = TorchModel(state | {name: np.ones((2, 3), np.float32)})
    assert model.left_out == [name] and list(model.names) == list(state)


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
