import dataclasses
import json
import logging
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
import golden
from convert import layouts, saving, verify
from samples import timm_state
from sinder_jax import checkpoint, families, param_tree, vit
from sinder_jax.data import decode, listing
from sinder_jax.model import Model

# Stored grid 4 x 4; the head width is not 64.
CONFIGS = {
    "mlp": vit.ViTConfig(32, 2, 2, "mlp", img_size=56),
    "swiglu": vit.ViTConfig(24, 2, 3, "swiglu", img_size=56),
    "mlp-registers": vit.ViTConfig(32, 2, 4, "mlp", 56, 14, 2, True, 0.0),
    "swiglu-registers": vit.ViTConfig(24, 2, 2, "swiglu", 56, 14, 4, True, 0.0),
}
# Rows and columns of patches, none of them the stored grid.
GRIDS = {"larger": (6, 6), "smaller": (3, 2), "wide": (4, 9)}

each_kind = pytest.mark.parametrize("kind", CONFIGS)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = param_tree.flatten(param_tree.shapes(config))
    return param_tree.unflatten(
        {
            path: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.1)
            + np.float32(path.endswith(("scale", "gamma")))
            for path, leaf in shapes.items()
        }
    )


def error_of(call, *args, kind=ValueError):
    """The message of the error that a call ends with, which must be one line."""
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Without PyTorch --------------------------------------------------------------


@pytest.mark.parametrize(
    "container,library",
    [("file", "torch"), ("directory", "torch"), ("directory", "transformers")],
)
def test_missing_library_is_said_and_nothing_is_compared(
    container, library, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("torch")
    config, params = CONFIGS["mlp"], random_params(CONFIGS["mlp"])
    hugging_face = container == "directory"
    table = layouts.table_of("hf" if hugging_face else "dinov2", config)
    path = tmp_path / ("hf" if hugging_face else "a.safetensors")
    saving.save(path, Model.of(config, params), table, directory=hugging_face)
    source = path if hugging_face else convert.to_torch(config, params)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        verify.compare(config, params, source)
    assert caught.value.name == library
    verify.print_verdict(path, path, made=path)
    note = f"verify: {library} is not installed: not compared.\n"
    assert capsys.readouterr().out == note and path.exists()


@pytest.mark.parametrize("told", ["by nobody", "by the user", "by the file"])
def test_a_guess_that_both_sides_share_is_told(told, tmp_path, capsys):
    pytest.importorskip("torch")
    config = vit.ViTConfig(384, 1, 6, "mlp", img_size=28)
    params = random_params(config)
    checkpoint.save(tmp_path / "jax", config, params)
    path = tmp_path / "a.safetensors"
    if told == "by the file":
        saving.save(path, Model.of(config, params), layouts.table_of("dinov2", config))
    else:
        save_file(convert.to_torch(config, params), path)
    heads = 6 if told == "by the user" else None
    verify.print_verdict(tmp_path / "jax", path, made=path, num_heads=heads)
    out = capsys.readouterr().out
    assert "agree with" in out
    unchecked = "not checked: the number of attention heads, 6 on both sides"
    assert (unchecked in out) == (told == "by nobody")


def test_sides_of_different_configs_are_refused_with_the_difference(tmp_path):
    pytest.importorskip("torch")
    config = CONFIGS["mlp"]
    params = random_params(config)
    checkpoint.save(tmp_path / "jax", config, params)
    other = dataclasses.replace(config, norm_epsilon=1e-5)
    path, table = tmp_path / "a.safetensors", layouts.table_of("dinov2", other)
    saving.save(path, Model.of(other, params), table)
    with pytest.raises(ValueError, match=r"differ in norm_epsilon \(1e-06 and 1e-05"):
        verify.print_verdict(tmp_path / "jax", path, made=path)
    assert not path.exists()


def test_photograph_has_the_size_of_the_stored_grid():
    config = dataclasses.replace(CONFIGS["mlp"], img_size=48, patch_size=8)
    image = verify.photograph(config)
    want = decode.training_crop(
        decode.read_rgb(listing.sample_images()[0]), 48, patch_size=8
    )
    assert image.shape == (1, 48, 48, 3) and image.dtype == np.float32
    statistics = families.of(config).statistics
    np.testing.assert_array_equal(image[0], decode.normalize(want, statistics))


def test_check_raises_with_the_numbers_unless_the_models_agree():
    same = verify.Comparison(3e-5, 1e-6, 2e-5, "PyTorch", 518)
    verify.check(same)
    assert "agree with PyTorch: RMS difference 1.0e-06" in str(same)
    for relative in (3e-5, float("inf"), float("nan")):
        other = same._replace(relative=relative)
        message = error_of(verify.check, other)
        assert "DIFFER from PyTorch" in message and "2.0e-05 allowed" in message


def test_nan_never_agrees():
    tokens = np.ones((1, 3, 4), np.float32)
    broken = tokens.copy()
    broken[0, 0, 0] = np.nan
    for pair in ((broken, tokens), (tokens, broken), (broken, broken)):
        assert np.isnan(verify.measure(*pair)).all()


# --- Tensors by the names of the hub and of timm ----------------------------------


@pytest.mark.parametrize("layout", ["dinov2", "timm"])
@each_kind
def test_model_agrees_with_its_tensors(kind, layout):
    pytest.importorskip("torch")
    config = CONFIGS[kind]
    params = random_params(config)
    state = convert.to_torch(config, params)
    tensors = timm_state(state) if layout == "timm" else state
    comparison = verify.compare(config, params, tensors)
    verify.check(comparison)
    assert 0 < comparison.relative < 3e-6  # an eighth of what is allowed
    assert comparison.image_size == 56 and "PyTorch" in comparison.against


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_models_with_defects_agree(name):
    pytest.importorskip("torch")
    arrays, meta = golden.load(name)
    state, architecture = golden.state(arrays), golden.architecture(meta)
    overrides = {k: v for k, v in architecture.items() if k.startswith("interpolate")}
    config, params = convert.from_torch(state, meta["num_heads"], **overrides)
    verify.check(verify.compare(config, params, state))


def test_verdict_stands_where_single_tokens_amplify_rounding():
    # The authors' own features stand in for PyTorch's: the images are no squares.
    arrays, meta = golden.load("moving")
    state, architecture = golden.state(arrays), golden.architecture(meta)
    overrides = {k: v for k, v in architecture.items() if k.startswith("interpolate")}
    config, params = convert.from_torch(state, meta["num_heads"], **overrides)
    images = np.ascontiguousarray(np.moveaxis(arrays["images"], 1, -1))
    cls, patches = (arrays[f"features/x_norm_{k}"] for k in ("clstoken", "patchtokens"))
    theirs = np.concatenate([cls[:, None], patches], axis=1)
    largest, relative = verify.measure(
        verify.jax_tokens(config, params, images), theirs
    )
    assert relative < 0.5 * verify.tolerance(config)
    assert largest > 2 * verify.tolerance(config)  # why the verdict is not by it


@pytest.mark.parametrize("kind", ["mlp", "swiglu-registers"])
def test_any_single_wrong_tensor_is_seen_but_the_mask_token(kind):
    pytest.importorskip("torch")
    config = CONFIGS[kind]
    params = random_params(config)
    state, image = convert.to_torch(config, params), verify.photograph(config)
    ours = verify.jax_tokens(config, params, image)
    unseen = []
    for name, array in state.items():
        wrong = state | {name: np.roll(array, 1, axis=-1)}
        theirs, _ = verify.torch_tokens(config, wrong, image)
        if verify.measure(ours, theirs)[1] <= verify.tolerance(config):
            unseen.append(name)
    assert unseen == ["mask_token"]


def test_another_image_does_not_agree():
    pytest.importorskip("torch")
    config = CONFIGS["mlp"]
    params = random_params(config)
    state, image = convert.to_torch(config, params), verify.photograph(config)
    ours = verify.jax_tokens(config, params, image)
    theirs, _ = verify.torch_tokens(config, state, image[:, ::-1].copy())
    assert verify.measure(ours, theirs)[1] > 100 * verify.tolerance(config)


def test_wrong_tensor_ends_in_an_error():
    pytest.importorskip("torch")
    config = CONFIGS["mlp"]
    params = random_params(config)
    state = convert.to_torch(config, params)
    state["blocks.1.ls2.gamma"] = state["blocks.0.ls2.gamma"]
    comparison = verify.compare(config, params, state)
    assert not comparison.agree
    assert "not the same model" in error_of(verify.check, comparison)


@pytest.mark.parametrize("number_format", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_number_formats_are_compared_as_they_stand(number_format):
    pytest.importorskip("torch")
    state = convert.to_torch(CONFIGS["mlp"], random_params(CONFIGS["mlp"]))
    stored = {name: array.astype(number_format) for name, array in state.items()}
    config, params = convert.from_torch(stored, num_heads=2)
    verify.check(verify.compare(config, params, stored))


def test_half_precision_is_another_model_than_the_one_it_was_rounded_from():
    pytest.importorskip("torch")
    config = CONFIGS["mlp"]
    params = random_params(config)
    state = convert.to_torch(config, params)
    rounded = {name: array.astype(np.float16) for name, array in state.items()}
    assert not verify.compare(config, params, rounded).agree


def test_tensors_that_make_no_model_or_another_one_are_named():
    pytest.importorskip("torch")
    config = CONFIGS["mlp-registers"]
    params = random_params(config)
    state = convert.to_torch(config, params)

    def message(changes, lacking=()):
        wrong = {k: v for k, v in (state | changes).items() if k not in lacking}
        return error_of(verify.compare, config, params, wrong)

    assert "cannot use the tensors: KeyError: 'norm.bias'" in message({}, ["norm.bias"])
    narrow = np.zeros((31, 32), np.float32)
    assert "cannot use the tensors" in message({"blocks.0.attn.proj.weight": narrow})
    assert "not (1, 19, 32)" in message({}, ["register_tokens"])


# --- Hugging Face directories -----------------------------------------------------

HF_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layernorm": "norm",
}


def hub_state(directory):
    """The tensors of a Hugging Face directory under the names of the hub."""
    state = load_file(directory / "model.safetensors")
    for name in list(state):
        if "attention.attention.query" in name:
            parts = (name.replace("query", part) for part in ("query", "key", "value"))
            fused = name.replace("attention.attention.query", "attn.qkv")
            state[fused] = np.concatenate([state.pop(part) for part in parts])
    renamed = {}
    for name, array in state.items():
        for theirs, ours in HF_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = array
    return renamed


def hf_model(config, seed=0):
    """A random model of transformers, no weight of which is 0 or 1."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "use_swiglu_ffn": config.ffn_layer == "swiglu",
    }
    if config.num_register_tokens:
        fields["num_register_tokens"] = config.num_register_tokens
        hf_config = transformers.Dinov2WithRegistersConfig(**fields)
        model = transformers.Dinov2WithRegistersModel(hf_config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            one = float("norm" in name and name.endswith("weight") or "lambda" in name)
            weight.copy_(one + 0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind -> the random model and the directory that transformers saved it in."""
    pytest.importorskip("transformers")
    models = {}
    for kind, config in CONFIGS.items():
        directory = tmp_path_factory.mktemp(kind)
        model = hf_model(config)
        with verify._quiet():
            model.save_pretrained(directory)
        models[kind] = model, directory
    return models


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of the directory of kind "mlp", to be damaged."""
    return shutil.copytree(saved["mlp"][1], tmp_path / "model")


def converted(kind, directory, **overrides):
    config = CONFIGS[kind]
    return convert.from_torch(hub_state(directory), config.num_heads, **overrides)


def rewrite(directory, **changes):
    """Replaces tensors of the directory's file, or deletes them (None)."""
    path = directory / "model.safetensors"
    state = load_file(path) | changes
    state = {name: array for name, array in state.items() if array is not None}
    save_file(state, path, metadata={"format": "pt"})


@each_kind
def test_model_agrees_with_transformers(kind, saved):
    _, directory = saved[kind]
    config, params = converted(kind, directory)
    assert dataclasses.replace(config, **resampling(CONFIGS[kind])) == CONFIGS[kind]
    assert verify.load(directory)[1] == {}
    comparison = verify.compare(config, params, directory)
    verify.check(comparison)
    assert 0 < comparison.relative < 3e-6  # an eighth of what is allowed
    name = "Dinov2WithRegistersModel" if "registers" in kind else "Dinov2Model"
    assert comparison.against.endswith(f" {name}")


def resampling(config):
    names = "interpolate_antialias", "interpolate_offset"
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.1.attention.attention.value.bias",
        "encoder.layer.0.layer_scale2.lambda1",
        "embeddings.position_embeddings",
    ],
)
def test_a_wrong_tensor_in_a_directory_is_seen(name, directory):
    config, params = converted("mlp", directory)
    array = load_file(directory / "model.safetensors")[name]
    rewrite(directory, **{name: np.roll(array, 1, axis=-1)})
    assert not verify.compare(config, params, directory).agree


def test_swapped_halves_of_swiglu_are_seen(saved, tmp_path):
    directory = shutil.copytree(saved["swiglu"][1], tmp_path / "model")
    config, params = converted("swiglu", directory)
    name = "encoder.layer.0.mlp.weights_in.weight"
    array = load_file(directory / "model.safetensors")[name]
    rewrite(directory, **{name: np.roll(array, len(array) // 2, axis=0)})
    assert not verify.compare(config, params, directory).agree


def test_wrong_number_of_heads_is_seen(directory):
    config, params = converted("mlp", directory)
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | {"num_attention_heads": 4}
    path.write_text(json.dumps(fields))
    assert not verify.compare(config, params, directory).agree


def test_directory_in_half_precision_agrees(directory):
    state = load_file(directory / "model.safetensors")
    rewrite(directory, **{k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    config, params = converted("mlp", directory)
    verify.check(verify.compare(config, params, directory))


def test_load_names_what_is_amiss_and_compare_refuses_it(directory):
    config, params = converted("mlp", directory)
    rewrite(
        directory,
        **{
            "layernorm.bias": None,
            "encoder.layer.0.mlp.fc3.bias": np.zeros(3, np.float32),
            "layernorm.weight": np.zeros(3, np.float32),
        },
    )
    assert verify.load(directory)[1] == {
        "missing": ["layernorm.bias"],
        "unexpected": ["encoder.layer.0.mlp.fc3.bias"],
        "mismatched": ["layernorm.weight is (3,), not (32,)"],
    }
    message = error_of(verify.compare, config, params, directory)
    assert "1 missing: layernorm.bias" in message
    assert "1 mismatched: layernorm.weight is (3,), not (32,)" in message


def test_directory_that_is_none_is_refused(directory, tmp_path):
    def refusal():
        return error_of(verify.load, directory)

    error_of(verify.load, tmp_path / "missing", kind=FileNotFoundError)
    (directory / "model.safetensors").write_bytes(b"broken")
    assert "transformers cannot load it" in refusal()
    (directory / "model.safetensors").unlink()
    assert "transformers cannot load it" in refusal()
    for text in ('{"model_type": "bert"}', '{"model_type": ["dinov2"]}', "{}"):
        (directory / "config.json").write_text(text)
        assert "must be dinov2 or dinov2_with_registers" in refusal()
    for text in ("[]", "{"):
        (directory / "config.json").write_text(text)
        assert "config.json: damaged" in refusal()
    (directory / "config.json").unlink()
    message = error_of(verify.load, directory, kind=FileNotFoundError)
    assert "config.json" in message


@pytest.fixture
def talkative():
    """Makes transformers as loud as it gets; its settings and what it logs."""
    hub = pytest.importorskip("huggingface_hub.utils")
    settings = pytest.importorskip("transformers.utils.logging")

    def now():
        bars = settings.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
        return settings.get_verbosity(), *bars

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    before = settings.get_verbosity()
    settings.set_verbosity_debug()
    settings.disable_progress_bar()
    hub.enable_progress_bars()  # one of the two only: both must be kept
    settings.add_handler(handler)
    yield now, records
    settings.remove_handler(handler)
    settings.enable_progress_bar()
    settings.set_verbosity(before)


def test_transformers_is_silent_and_keeps_its_settings(directory, talkative, capfd):
    settings, records = talkative
    rewrite(directory, **{"layernorm.bias": None})  # otherwise a table in the log
    before = settings()
    verify.load(directory)
    assert settings() == before
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.enable_progress_bar()
    before = settings()
    verify.load(directory)
    assert settings() == before
    assert not records
    assert capfd.readouterr() == ("", "")
    transformers.Dinov2Model.from_pretrained(directory)
    assert records and capfd.readouterr().err  # it would have been heard


# --- Where transformers resamples the position embedding --------------------------


def both(kind, saved, grid, **overrides):
    """Features by the JAX model and by transformers, which saved the same weights."""
    torch = pytest.importorskip("torch")
    model, directory = saved[kind]
    config, params = converted(kind, directory, **overrides)
    rows, columns = GRIDS[grid]
    sides = rows * config.patch_size, columns * config.patch_size
    images = np.random.default_rng(0).standard_normal((1, *sides, 3), np.float32)
    with torch.inference_mode():
        pixels = torch.from_numpy(images).movedim(-1, 1).contiguous()
        theirs = model(pixels).last_hidden_state.numpy()
    return verify.jax_tokens(config, params, images), theirs


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["mlp", "swiglu-registers"])
def test_transformers_resamples_as_the_hub_with_offset_zero(kind, grid, saved):
    # Antialias as the hub's: not for plain models, always for those with registers.
    options = {"interpolate_offset": 0.0, "interpolate_antialias": "registers" in kind}
    ours, theirs = both(kind, saved, grid, **options)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_transformers_leaves_out_the_offset_of_plain_hub_models(grid, saved):
    ours, theirs = both("mlp", saved, grid, interpolate_offset=0.1)
    assert verify.measure(ours, theirs)[1] > 1e-3
