import dataclasses
import pickle
import re
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import convert
import golden
from convert import io, names
from sinder_jax import checkpoint, vit

SMALL = {
    "mlp": vit.ViTConfig(128, 3, 2, "mlp", img_size=56),
    "swiglu": vit.ViTConfig(64, 2, 1, "swiglu", img_size=28),
    "registers": vit.ViTConfig(64, 2, 1, "mlp", 42, 14, 4, True, 0.0),
    "swiglu-registers": vit.ViTConfig(64, 1, 1, "swiglu", 16, 8, 2, True, 0.0),
}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = checkpoint.flatten(vit.param_shapes(config))
    return checkpoint.unflatten(
        {
            path: rng.standard_normal(leaf.shape, np.float32)
            for path, leaf in shapes.items()
        }
    )


def random_state(config, seed=0):
    return convert.to_torch(config, random_params(config, seed))


def assert_same_bytes(got, want):
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        assert got[name].tobytes() == want[name].tobytes(), name


def error_of(call, *args, kind=ValueError, **kwargs):
    """The message of the error that a call ends with, which must be one line."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Round trips and axes ---------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
def test_params_come_back_with_the_same_bytes(kind):
    params = random_params(SMALL[kind])
    config, back = convert.from_torch(convert.to_torch(SMALL[kind], params))
    assert config == SMALL[kind]
    flat, flat_back = checkpoint.flatten(params), checkpoint.flatten(back)
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
        result = checkpoint.flatten(tree)
    else:
        source, result = checkpoint.flatten(params), state
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


@pytest.mark.parametrize("name", vit.CONFIGS)
def test_hub_architecture_is_inferred_from_its_shapes(name):
    config = vit.CONFIGS[name]
    shapes = {key: slot.shape for key, slot in names.table("dinov2", config).items()}
    assert sum(np.prod(shape) for shape in shapes.values()) == vit.num_params(config)
    # Views of one number: the giant's shapes without the giant's memory.
    state = {
        key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()
    }
    assert names.infer_config(state) == config
    assert names.hub_name(config) == name


@pytest.mark.parametrize("name", vit.CONFIGS)
def test_one_block_of_a_hub_model_comes_back_with_the_same_bytes(name):
    config = dataclasses.replace(vit.CONFIGS[name], depth=1)
    params = random_params(config)
    state = convert.to_torch(config, params)
    inferred, back = convert.from_torch(state)
    assert inferred == config
    flat = checkpoint.flatten(back)
    for path, leaf in checkpoint.flatten(params).items():
        assert flat[path].tobytes() == leaf.tobytes(), path


def test_hub_names_of_a_block_are_those_published():
    # facebookresearch/dinov2, dinov2_vitg14_reg4_pretrain.pth.
    block = names.table("dinov2", vit.CONFIGS["dinov2_vitg14_reg"])
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
    del state["norm.bias"], state["blocks.1.ls1.gamma"], state["mask_token"]
    state["head.weight"] = np.ones((2, 3), np.float32)
    state["blocks.2.attn.qkv.weight"] = state["blocks.2.attn.qkv.weight"].T
    state["cls_token"] = state["cls_token"][0]
    state["norm.weight"] = state["norm.weight"].astype(np.int64)
    state["pos_embed"][0, 3, 5] = np.nan
    state["blocks.0.mlp.fc1.bias"][7] = -np.inf
    message = error_of(convert.from_torch, state)
    for part in (
        "3 missing: mask_token, blocks.1.ls1.gamma, norm.bias;",
        "1 surplus: head.weight;",
        "2 misshapen: cls_token is (1, 128), not (1, 1, 128), ",
        "blocks.2.attn.qkv.weight is (128, 384), not (384, 128);",
        "norm.weight (int64)",
        "2 with NaN or infinity (as float32): pos_embed, blocks.0.mlp.fc1.bias",
    ):
        assert part in message


@pytest.mark.parametrize("key", names.table("dinov2", SMALL["swiglu"]))
def test_any_single_missing_tensor_is_named(key):
    state = random_state(SMALL["swiglu"])
    del state[key]
    assert f"1 missing: {key}." in error_of(convert.from_torch, state)


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
    assert "no DINOv2 model" in message and "fc.weight" in message


def renamed(old, new, kind="mlp"):
    state = random_state(SMALL[kind])
    return {re.sub(old, new, key): array for key, array in state.items()}


@pytest.mark.parametrize(
    ("layout", "state"),
    [
        ("Hugging Face", renamed(r"^blocks\.", "encoder.layer.")),
        ("Hugging Face", renamed("^cls_token", "dinov2.embeddings.cls_token")),
        ("timm", renamed("^register_tokens", "reg_token", "registers")),
        ("training", renamed("^", "teacher.backbone.")),
        ("training", renamed(r"^blocks\.", "blocks.0.")),
    ],
    ids=["hf", "hf-prefixed", "timm-registers", "teacher", "chunked"],
)
def test_other_layouts_are_recognized_by_name(layout, state):
    message = error_of(convert.from_torch, state)
    assert layout in message and "dinov2 layout" in message


def test_timm_is_recognized_by_its_shapes():
    folded = random_state(SMALL["registers"])
    folded["pos_embed"] = folded["pos_embed"][:, 1:]
    assert "timm" in error_of(convert.from_torch, folded)
    packed = {
        key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): array
        for key, array in random_state(SMALL["swiglu"]).items()
    }
    assert "timm" in error_of(convert.from_torch, packed)


def test_unknown_layout_lists_the_allowed_ones():
    config = SMALL["mlp"]
    message = error_of(convert.to_torch, config, random_params(config), layout="onnx")
    assert "'onnx'" in message and "'dinov2'" in message


def test_params_that_do_not_fit_are_refused_on_the_way_out():
    config, params = SMALL["mlp"], random_params(SMALL["mlp"])
    del params["norm"]["bias"]
    params["head"] = np.ones(3, np.float32)
    params["cls_token"] = params["cls_token"][0]
    message = error_of(convert.to_torch, config, params)
    for path in ("norm/bias", "head", "cls_token"):
        assert path in message


# --- Files ------------------------------------------------------------------------


SUFFIXES = [".pth", ".pt", ".safetensors"]


def file_with(suffix, folder):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    return folder / f"model{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("number_format", ["float32", "float16", "bfloat16", "float64"])
def test_file_gives_back_the_bytes_and_the_number_format(
    suffix, number_format, tmp_path
):
    path = file_with(suffix, tmp_path)
    state = {
        key: array.astype(np.dtype(number_format))
        for key, array in random_state(SMALL["registers"]).items()
    }
    io.write_state_dict(path, state)
    back = io.read_state_dict(path)
    assert_same_bytes({key: back[key] for key in state}, state)
    assert back.keys() == state.keys()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_views_are_written_as_what_they_show(suffix, tmp_path):
    path = file_with(suffix, tmp_path)
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    frozen = base[0].copy()
    frozen.flags.writeable = False
    state = {
        "turned": base.T,
        "part": base[:, ::2],
        "one": base[1, 1],
        "frozen": frozen,
    }
    io.write_state_dict(path, {key: np.asarray(x) for key, x in state.items()})
    back = io.read_state_dict(path)
    for key, array in state.items():
        assert back[key].shape == array.shape
        np.testing.assert_array_equal(back[key], array)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_of_a_file_do_not_depend_on_its_name(suffix, tmp_path):
    path = file_with(suffix, tmp_path)
    state = random_state(SMALL["swiglu"])
    io.write_state_dict(path, state)
    io.write_state_dict(tmp_path / f"other{suffix}", state)
    assert path.read_bytes() == (tmp_path / f"other{suffix}").read_bytes()


def test_pytorch_loads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    state = random_state(SMALL["mlp"])
    io.write_state_dict(tmp_path / "model.pth", state)
    loaded = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(loaded) == list(state)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())


def test_written_safetensors_name_the_format_that_transformers_asks_for(tmp_path):
    io.write_state_dict(tmp_path / "a.safetensors", random_state(SMALL["mlp"]))
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_reads_what_pytorch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    want = {key: tensor.float().numpy() for key, tensor in layer.state_dict().items()}
    for name, new in (("new.pth", True), ("old.pth", False)):
        torch.save(
            layer.state_dict(), tmp_path / name, _use_new_zipfile_serialization=new
        )
        back = io.read_state_dict(tmp_path / name)
        assert {array.dtype for array in back.values()} == {
            np.dtype(ml_dtypes.bfloat16)
        }
        for key, array in want.items():
            np.testing.assert_array_equal(back[key].astype(np.float32), array)


def test_parameters_and_shared_storage_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(6.0).reshape(2, 3)
    torch.save({"p": torch.nn.Parameter(x), "t": x.T}, tmp_path / "model.pt")
    back = io.read_state_dict(tmp_path / "model.pt")
    np.testing.assert_array_equal(back["p"], x.numpy())
    np.testing.assert_array_equal(back["t"], x.numpy().T)


def test_existing_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"mine")
    state = random_state(SMALL["mlp"])
    message = error_of(io.write_state_dict, path, state, kind=FileExistsError)
    assert str(path) in message and path.read_bytes() == b"mine"
    io.write_state_dict(path, state, overwrite=True)
    assert_same_bytes(
        dict(sorted(io.read_state_dict(path).items())), dict(sorted(state.items()))
    )


def test_missing_directory_and_unknown_suffix_are_refused_before_writing(tmp_path):
    state = random_state(SMALL["mlp"])
    error_of(
        io.write_state_dict,
        tmp_path / "none" / "model.safetensors",
        state,
        kind=FileNotFoundError,
    )
    assert ".safetensors" in error_of(
        io.write_state_dict, tmp_path / "model.onnx", state
    )
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_nothing(tmp_path, monkeypatch):
    def half_a_file(path, arrays):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(io, "_write_safetensors", half_a_file)
    state = random_state(SMALL["mlp"])
    path = tmp_path / "model.safetensors"
    assert "disk full" in error_of(io.write_state_dict, path, state, kind=OSError)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    error_of(io.write_state_dict, path, state, overwrite=True, kind=OSError)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]


def test_missing_torch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "model.pth"
    path.write_bytes(b"anything")
    for call in (io.read_state_dict, lambda path: io.write_state_dict(path, {})):
        message = error_of(call, path, kind=ImportError)
        assert "pip install 'sinder_jax[torch]'" in message


# --- Files that are not what they should be ---------------------------------------


def test_missing_file_directory_and_unknown_suffix_are_named(tmp_path):
    missing = tmp_path / "none.safetensors"
    assert str(missing) in error_of(io.read_state_dict, missing, kind=FileNotFoundError)
    assert "directory" in error_of(io.read_state_dict, tmp_path)
    other = tmp_path / "model.onnx"
    other.write_bytes(b"x")
    assert "'.onnx'" in error_of(io.read_state_dict, other)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.1, 0.5, 0.9, -1], ids=str)
def test_truncated_file_is_refused(suffix, kept, tmp_path):
    path = file_with(suffix, tmp_path)
    io.write_state_dict(path, random_state(SMALL["swiglu"]))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    message = error_of(io.read_state_dict, path)
    assert str(path) in message and "damaged" in message


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "data", [b"hello, world\n" * 99, b"\xff" * 999, b"PK\3\4" * 99]
)
def test_file_of_something_else_is_refused(suffix, data, tmp_path):
    path = file_with(suffix, tmp_path)
    path.write_bytes(data)
    assert str(path) in error_of(io.read_state_dict, path)


class Evil:
    """Unpickling it makes a directory."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.mkdir, (Path(self.target),)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_pickle_that_would_run_code_is_refused_and_runs_nothing(new_format, tmp_path):
    torch = pytest.importorskip("torch")
    path, target = tmp_path / "evil.pth", tmp_path / "executed"
    contents = {"cls_token": torch.ones(3), "x": Evil(target)}
    torch.save(contents, path, _use_new_zipfile_serialization=new_format)
    with warnings.catch_warnings(record=True) as caught:
        message = error_of(io.read_state_dict, path)
    assert not caught
    assert "would run code" in message and str(path) in message
    assert not target.exists()
    # Control: it is evil, and a loader that trusts it does run it.
    torch.load(path, weights_only=False)
    assert target.exists()


def test_plain_pickle_that_would_run_code_is_refused(tmp_path):
    pytest.importorskip("torch")
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"x": Evil(target)}))
    message = error_of(io.read_state_dict, path)
    assert "would run code" in message
    assert not target.exists()


def test_whole_pickled_model_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    message = error_of(io.read_state_dict, tmp_path / "model.pth")
    assert "torch.nn.modules.linear.Linear" in message and "state_dict()" in message


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        ([1, 2], "list"),
        ({}, "no tensor"),
        ({"epoch": 3}, "'epoch' holds a int"),
        ({1: "tensor"}, "1"),
        ({"teacher": {"x": "tensor"}, "epoch": 1}, "training checkpoint"),
    ],
    ids=["list", "empty", "number", "numbered", "nested"],
)
def test_pickle_of_something_else_is_refused(contents, named, tmp_path):
    torch = pytest.importorskip("torch")

    def with_tensors(value):
        if isinstance(value, dict):
            return {key: with_tensors(inner) for key, inner in value.items()}
        return torch.ones(2) if value == "tensor" else value

    torch.save(with_tensors(contents), tmp_path / "model.pth")
    message = error_of(io.read_state_dict, tmp_path / "model.pth")
    assert named in message and "state dict" in message


def test_sparse_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(3).to_sparse()}, tmp_path / "model.pth")
    message = error_of(io.read_state_dict, tmp_path / "model.pth")
    assert "Sparse" in message and "dense" in message


def test_safetensors_of_an_unknown_number_format_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones(4, np.float32)}, path)
    data = path.read_bytes()
    assert data.count(b'"F32"') == 1
    path.write_bytes(data.replace(b'"F32"', b'"X32"'))
    assert str(path) in error_of(io.read_state_dict, path)
