"""What each command of `python -m convert` makes of a model, and what it says."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import convert
import golden
from benchmarks import synthetic
from convert import fetch, layouts, saving
from convert.__main__ import main
from convert.files import hugging_face, reading, sha256, writing
from convert.files.tensors import Spec
from samples import SMALL, assert_same_bytes, random_params, read_state_dict
from sinder_jax import checkpoint, delta, factor, kernels, param_tree, vit
from sinder_jax.model import Model
from sinder_jax.storage import delta_file

KINDS = {"swiglu": SMALL["swiglu"], "registers": SMALL["registers"]}
CONTAINERS = ["checkpoint", "dinov2", "hf", "timm"]


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def stored(folder, container, config, params):
    """A model in a container: a checkpoint or a layout's file or directory."""
    if container == "checkpoint":
        checkpoint.save(folder / "model", config, params)
        return folder / "model"
    state = convert.to_torch(config, params, container)
    if container == "hf":
        specs = {key: Spec(x.shape, "float32") for key, x in state.items()}
        contents = hugging_face.contents(config)
        writing.write_directory(folder / "hf", contents, specs, state.items())
        return folder / "hf"
    writing.write_state_dict(folder / f"{container}.safetensors", state)
    return folder / f"{container}.safetensors"


def loaded(path):
    model = convert.open_model(path)
    return dict(model.leaves())


@pytest.fixture(scope="module")
def repair():
    """By kind: params, their factors, ε of the last blocks, repaired params."""

    def make(config):
        params = random_params(config)
        factors = factor.factorize(config, params)
        rng = np.random.default_rng(1)
        eps = {}
        for name, sigma in factors.sigma.items():
            eps[name] = np.zeros_like(sigma)
            size = sigma[-1].shape
            eps[name][-1] = 0.05 * sigma[-1] * rng.uniform(-1, 1, size)
        return params, factors, eps, factor.merge(params, factors, eps)

    return {kind: make(config) for kind, config in KINDS.items()}


# --- Conversions ------------------------------------------------------------------


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
    assert "--interpolate-offset=0 is its way" in capsys.readouterr().out


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
        verify, "compare", lambda c, _, state, layout: compare(c, other, state, layout)
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


# --- Patches ----------------------------------------------------------------------


def assert_is_repaired(path, repaired, base, changed_block):
    """Kernels within 1e-6, all else byte for byte as in the base."""
    got = loaded(path)
    for name, want in param_tree.flatten(repaired).items():
        if name == "mask_token":
            continue
        original = param_tree.flatten(base)[name]
        if name in ("cls_token", "pos_embed"):
            continue  # timm's are added up; compared by digest below
        if want.tobytes() == original.tobytes():
            assert got[name].tobytes() == original.tobytes(), name
            continue
        for block, kernel in enumerate(want):
            if block != changed_block:
                assert got[name][block].tobytes() == original[block].tobytes()
            # ε comes back within half an ulp of σ; the rest is float32's rounding
            error = np.linalg.norm(got[name][block] - kernel)
            assert error < 1e-6 * np.linalg.norm(kernel), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_apply_of_diff_is_the_repaired_model(container, kind, repair, tmp_path, capsys):
    config, (params, _, _, repaired) = KINDS[kind], repair[kind]
    (tmp_path / "b").mkdir()
    (tmp_path / "r").mkdir()
    base = stored(tmp_path / "b", container, config, params)
    other = stored(tmp_path / "r", "dinov2", config, repaired)
    made = tmp_path / "made.safetensors"
    run("diff", base, other, made)
    out = capsys.readouterr().out
    assert f"in blocks {config.depth - 1};" in out and "left out as rounding" in out
    target = tmp_path / ("done" if base.is_dir() else "done.safetensors")
    run("apply", base, made, target)
    assert_is_repaired(target, repaired, params, config.depth - 1)
    if container != "checkpoint":  # in the base's own layout, nothing more or less
        want = reading.open_state_dict(base)
        assert reading.open_state_dict(target).keys() == want.keys()
        assert reading.open_state_dict(target).config == want.config
    steps = convert.open_model(target).provenance["steps"]
    assert "apply made.safetensors, SHA-256" in steps[-1]
    assert made.stat().st_size < 100_000


def test_a_patch_fits_its_base_in_any_layout(repair, tmp_path):
    config, (params, _, _, repaired) = KINDS["registers"], repair["registers"]
    (tmp_path / "r").mkdir()
    base = stored(tmp_path, "dinov2", config, params)
    other = stored(tmp_path / "r", "hf", config, repaired)
    run("diff", base, other, tmp_path / "made.safetensors")
    for container in ("checkpoint", "hf", "timm"):
        base = stored(tmp_path, container, config, params)
        target = tmp_path / f"done_{container}{'' if base.is_dir() else '.safetensors'}"
        run("apply", base, tmp_path / "made.safetensors", target)
        assert_is_repaired(target, repaired, params, config.depth - 1)


def test_half_a_patch_is_half_the_change(repair, tmp_path):
    config, (params, factors, eps, repaired) = KINDS["swiglu"], repair["swiglu"]
    (tmp_path / "r").mkdir()
    base = stored(tmp_path, "dinov2", config, params)
    other = stored(tmp_path / "r", "dinov2", config, repaired)
    run("diff", base, other, tmp_path / "made.safetensors")
    half = tmp_path / "half.safetensors"
    run("apply", base, tmp_path / "made.safetensors", half, "--scale=0.5")
    want = factor.merge(params, factors, {name: e / 2 for name, e in eps.items()})
    assert_is_repaired(half, want, params, config.depth - 1)


def test_another_base_is_refused(repair, tmp_path, capsys):
    config, (params, _, _, repaired) = KINDS["swiglu"], repair["swiglu"]
    (tmp_path / "r").mkdir()
    base = stored(tmp_path, "dinov2", config, params)
    other = stored(tmp_path / "r", "dinov2", config, repaired)
    run("diff", base, other, tmp_path / "made.safetensors")
    target = tmp_path / "done.safetensors"
    line = refusal(capsys, "apply", other, tmp_path / "made.safetensors", target)
    assert "a delta fits only the very weights" in line and not target.exists()
    small = stored(
        tmp_path / "r", "checkpoint", SMALL["mlp"], random_params(SMALL["mlp"])
    )
    line = refusal(
        capsys, "apply", small, tmp_path / "made.safetensors", tmp_path / "x"
    )
    assert "architectures differ in" in line and not (tmp_path / "x").exists()
    line = refusal(capsys, "diff", base, small, tmp_path / "x.safetensors")
    assert "architectures differ in embed_dim (64 and 128)" in line


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_the_authors_rebuilt_files_give_a_patch(name, tmp_path, capsys):
    arrays, meta = golden.load(name)
    writing.write_state_dict(tmp_path / "base.safetensors", golden.state(arrays))
    merged = golden.state(arrays) | golden.state(arrays, "merged")
    writing.write_state_dict(tmp_path / "merged.safetensors", merged)
    heads = f"--num-heads={meta['num_heads']}"
    base, made = tmp_path / "base.safetensors", tmp_path / "made.safetensors"
    run("diff", base, tmp_path / "merged.safetensors", made, heads)
    run("apply", base, made, tmp_path / "done.safetensors", heads)
    got = read_state_dict(tmp_path / "done.safetensors")
    for key, tensor in merged.items():
        # the authors' float32 SVDs and sums: 2.5e-6 measured in our own runs
        error = np.linalg.norm(got[key] - tensor)
        assert error <= 5e-6 * np.linalg.norm(tensor), key
    assert "differ by rounding alone" in capsys.readouterr().out


def test_a_change_that_is_no_repair_is_refused_by_name(repair, tmp_path, capsys):
    config, (params, _, _, repaired) = KINDS["swiglu"], repair["swiglu"]
    base = stored(tmp_path, "dinov2", config, params)
    state = convert.to_torch(config, repaired)
    state["blocks.0.norm1.weight"] = state["blocks.0.norm1.weight"] * 1.01
    writing.write_state_dict(tmp_path / "other.safetensors", state)
    made = tmp_path / "made.safetensors"
    line = refusal(capsys, "diff", base, tmp_path / "other.safetensors", made)
    assert "norm1/scale of block 0 by 0.01" in line and not made.exists()


def test_a_patch_is_inspected(repair, tmp_path, capsys):
    config, (params, factors, eps, _) = KINDS["swiglu"], repair["swiglu"]
    made = delta.from_eps(config, params, factors, eps)
    delta_file.save(tmp_path / "a.safetensors", made, {"provenance": json.dumps({})})
    run("inspect", tmp_path / "a.safetensors")
    out = capsys.readouterr().out
    assert made.base in out and "in blocks 1;" in out


# --- Inspect ----------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_inspect_prints_the_largest_singular_values(container, tmp_path, capsys):
    config, params = KINDS["swiglu"], random_params(KINDS["swiglu"])
    run("inspect", stored(tmp_path, container, config, params))
    out = capsys.readouterr().out
    assert "dinov2 layout" in out or "not known" in out or container in out
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("block "))
    assert lines[start].split()[1:] == list(kernels.names(config))
    _, stacks = kernels.split(config, params)
    for block in range(config.depth):
        cells = lines[start + 1 + block].split()
        want = [np.linalg.norm(stack[block], 2) for stack in stacks.values()]
        assert int(cells[0]) == block
        # printed with four decimals
        np.testing.assert_allclose([float(x) for x in cells[1:]], want, atol=6e-5)


def test_inspect_says_what_it_verified(tmp_path, capsys):
    path = stored(tmp_path, "dinov2", SMALL["mlp"], random_params(SMALL["mlp"]))
    run("inspect", path)
    out = capsys.readouterr().out
    assert "the bytes against dinov2.safetensors.sha256" in out
    assert sha256.of_file(path) in out
    sha256.side_file(path).unlink()
    run("inspect", path)
    assert "no .sha256 is beside it" in capsys.readouterr().out


def test_a_changed_export_is_noticed_without_its_side_file(tmp_path, capsys):
    checkpoint.save(tmp_path / "jax", SMALL["mlp"], random_params(SMALL["mlp"]))
    run("to-torch", tmp_path / "jax", tmp_path / "a.safetensors")
    sha256.side_file(tmp_path / "a.safetensors").unlink()
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x3f")
    for command in (["inspect"], ["to-jax"]):
        target = [tmp_path / "dst"] if command == ["to-jax"] else []
        line = refusal(capsys, *command, tmp_path / "a.safetensors", *target)
        assert "damaged" in line and not (tmp_path / "dst").exists()


# --- Against transformers -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "registers", "swiglu-registers"])
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


def test_a_fetched_name_must_be_the_named_architecture(tmp_path, monkeypatch, capsys):
    path = stored(tmp_path, "dinov2", SMALL["mlp"], random_params(SMALL["mlp"]))
    shutil.copy(path, tmp_path / "dinov2_vits14_pretrain.safetensors")
    monkeypatch.setattr(
        fetch,
        "fetch",
        lambda name: tmp_path / "dinov2_vits14_pretrain.safetensors",
    )
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, "to-jax", "dinov2_vits14", tmp_path / "jax")
    assert "got a DINOv2 model of width 128" in line
    assert not (tmp_path / "jax").exists()
