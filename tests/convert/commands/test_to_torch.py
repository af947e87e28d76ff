"""`to-torch`, and there and back: every layout, the origin, verification."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import convert
from benchmarks import synthetic
from conversions import KINDS, refusal, run, stored
from convert import layouts, saving
from convert.files import sha256, writing
from samples import SMALL, assert_same_bytes, random_params, read_state_dict
from sinder_jax import checkpoint, param_tree, vit
from sinder_jax.model import Model


@pytest.mark.parametrize("layout", layouts.WRITTEN)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_leads_to_the_same_digest(layout, kind, tmp_path, capsys):
    config, params = KINDS[kind], random_params(KINDS[kind])
    path = stored(tmp_path, layout, config, params)
    run("to-jax", path, tmp_path / "jax")
    out = capsys.readouterr().out
    assert ("no mask token" in out) == (layout == "timm")
    got = re.search(r"digest ([0-9a-f]{64})", out)[1]
    assert got == param_tree.digest(param_tree.flatten(params))
    assert checkpoint.load(tmp_path / "jax")[0] == config


@pytest.mark.parametrize("kind", KINDS)
def test_hub_to_jax_to_every_layout_and_back(kind, tmp_path):
    config, params = KINDS[kind], random_params(KINDS[kind])
    path = stored(tmp_path, "dinov2", config, params)
    run("to-jax", path, tmp_path / "jax")
    for layout in layouts.WRITTEN:
        back = tmp_path / (layout if layout == "hf" else f"back_{layout}.safetensors")
        run("to-torch", tmp_path / "jax", back, f"--layout={layout}")
        state = convert.to_torch(config, params, layout)
        got = read_state_dict(back)
        assert_same_bytes({key: got[key] for key in state}, state)
        assert got.keys() == state.keys()
        assert convert.open_model(back).config == config


@pytest.mark.parametrize("last", ["last.safetensors", "last.pth"])
def test_origin_travels_through_every_file(last, tmp_path, capsys):
    if last.endswith(".pth"):
        pytest.importorskip("torch")
    path = stored(tmp_path, "dinov2", SMALL["swiglu"], random_params(SMALL["swiglu"]))
    digest = sha256.of_file(path)
    run("to-jax", path, tmp_path / "jax")
    run("to-torch", tmp_path / "jax", tmp_path / "hf", "--layout=hf")
    run("to-jax", tmp_path / "hf", tmp_path / "again")
    run("to-torch", tmp_path / "again", tmp_path / last)
    capsys.readouterr()
    run("inspect", tmp_path / last)
    out = capsys.readouterr().out
    assert f"dinov2.safetensors, dinov2 layout, SHA-256 {digest}" in out
    steps = re.findall(r"then (\S+)", out)
    assert steps == ["to-jax,", "to-torch", "to-jax,", "to-torch"]


@pytest.mark.parametrize("steps", [5, [5], "text"])
def test_a_strange_provenance_is_one_line(steps, tmp_path, capsys):
    config, params = SMALL["mlp"], random_params(SMALL["mlp"])
    provenance = {"source": "x", "steps": steps}
    checkpoint.save(tmp_path / "jax", config, params, provenance)
    told = saving.description(Model.of(config, params, provenance), "0" * 64)
    state = convert.to_torch(config, params)
    writing.write_state_dict(tmp_path / "a.safetensors", state, metadata=told)
    for path in (tmp_path / "jax", tmp_path / "a.safetensors"):
        assert "not a list of texts" in refusal(capsys, "inspect", path)


def test_options_of_the_conversion_travel_too(tmp_path):
    path = stored(tmp_path, "dinov2", SMALL["mlp"], random_params(SMALL["mlp"]))
    run("to-jax", path, tmp_path / "jax", "--interpolate-antialias=true")
    run("to-torch", tmp_path / "jax", tmp_path / "hf", "--layout=hf")
    assert convert.open_model(tmp_path / "hf").config.interpolate_antialias


def test_heads_of_a_hugging_face_directory_are_read(tmp_path):
    config = vit.ViTConfig(48, 2, 4, "mlp", img_size=28)
    path = stored(tmp_path, "hf", config, random_params(config))
    assert convert.open_model(path).config.num_heads == 4


def test_what_a_layout_cannot_say_is_said(tmp_path, capsys):
    params = random_params(SMALL["registers"])
    checkpoint.save(tmp_path / "jax", SMALL["registers"], params)
    run(
        "to-torch",
        tmp_path / "jax",
        tmp_path / "timm.safetensors",
        "--layout=timm",
    )
    out = capsys.readouterr().out
    assert "has no mask token" in out and "position embedding to it for good" in out
    checkpoint.save(tmp_path / "plain", SMALL["mlp"], random_params(SMALL["mlp"]))
    run("to-torch", tmp_path / "plain", tmp_path / "hf", "--layout=hf")
    assert "hf resamples the position embedding" in capsys.readouterr().out
    run("to-jax", tmp_path / "hf", tmp_path / "back")
    assert "--interpolate-offset=0 does the same" in capsys.readouterr().out


@pytest.mark.parametrize("layout", layouts.WRITTEN)
def test_verify_compares_with_pytorch(layout, tmp_path, capsys):
    pytest.importorskip("torch")
    if layout == "hf":
        pytest.importorskip("transformers")
    config, params = SMALL["registers"], random_params(SMALL["registers"])
    checkpoint.save(tmp_path / "jax", config, params)
    target = tmp_path / ("hf" if layout == "hf" else "model.safetensors")
    run("to-torch", tmp_path / "jax", target, f"--layout={layout}", "--verify")
    run("to-jax", target, tmp_path / "back", "--verify")
    lines = capsys.readouterr().out.splitlines()
    verified = [line for line in lines if line.startswith("verify: ")]
    assert len(verified) == 2
    for line in verified:
        assert "agree with" in line and "largest" in line


def test_a_model_that_fails_its_verification_is_removed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    from convert import verify

    config, params = SMALL["mlp"], random_params(SMALL["mlp"])
    path = stored(tmp_path, "dinov2", config, params)
    before = sorted(tmp_path.iterdir())
    other = random_params(config, seed=1)
    compare = verify.compare
    monkeypatch.setattr(
        verify, "compare", lambda c, _, source: compare(c, other, source)
    )
    line = refusal(capsys, "to-jax", path, tmp_path / "jax", "--verify")
    assert "DIFFER" in line and sorted(tmp_path.iterdir()) == before
    back = tmp_path / "timm.safetensors"
    line = refusal(capsys, "to-torch", path, back, "--layout=timm", "--verify")
    assert "DIFFER" in line and sorted(tmp_path.iterdir()) == before


def test_a_file_is_brought_from_one_layout_into_another(tmp_path):
    config, params = SMALL["swiglu"], random_params(SMALL["swiglu"])
    path = stored(tmp_path, "dinov2", config, params)
    run("to-torch", path, tmp_path / "hf", "--layout=hf")
    state = convert.to_torch(config, params, "hf")
    got = read_state_dict(tmp_path / "hf")
    assert_same_bytes({key: got[key] for key in state}, state)


# --- Against transformers -----------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("swiglu", "registers")),
        "mlp",
        "swiglu-registers",
    ],
)
def test_transformers_loads_the_directory_and_gives_our_features(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from convert import verify

    # Weights of a trained model's scale: with larger ones float32 itself is far off.
    config, params = SMALL[kind], synthetic.random_params(SMALL[kind])
    checkpoint.save(tmp_path / "jax", config, params)
    run("to-torch", tmp_path / "jax", tmp_path / "hf", "--layout=hf")
    assert not verify.load(tmp_path / "hf")[1]
    name = "Dinov2WithRegistersModel" if config.num_register_tokens else "Dinov2Model"
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "hf").eval()
    # transformers' plain model has no offset, where the hub has 0.1
    ours = vit.ViT(dataclasses.replace(config, interpolate_offset=0.0))
    patch_size, grid = config.patch_size, config.grid_size
    for rows, columns in ((grid, grid), (grid + 1, grid + 3), (2 * grid + 1, grid)):
        shape = (1, rows * patch_size, columns * patch_size, 3)
        image = np.random.default_rng(rows).standard_normal(shape).astype(np.float32)
        with torch.no_grad():
            pixels = torch.from_numpy(np.moveaxis(image, 3, 1).copy())
            want = theirs(pixel_values=pixels).last_hidden_state[0].numpy()
        features = ours.apply({"params": params}, jnp.asarray(image))
        patches = np.asarray(features.patches[0]).reshape(rows * columns, -1)
        got = np.concatenate([features.cls, features.registers[0], patches])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_what_transformers_saves_comes_back_with_the_same_bytes(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=42,
        use_swiglu_ffn=True,
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "theirs")
    run("to-jax", tmp_path / "theirs", tmp_path / "jax")
    assert checkpoint.load(tmp_path / "jax")[0].num_heads == 2
    run("to-torch", tmp_path / "jax", tmp_path / "ours", "--layout=hf")
    want = read_state_dict(tmp_path / "theirs")
    got = read_state_dict(tmp_path / "ours")
    assert got.keys() == want.keys()
    assert_same_bytes({key: got[key] for key in want}, want)
    # and what is in memory
    state = {
        key: tensor.numpy()
        for key, tensor in transformers.Dinov2Model(config).state_dict().items()
    }
    _, params = convert.from_torch(state, num_heads=2)
    assert params["blocks"]["attn"]["qkv"]["kernel"].shape == (2, 64, 192)
