"""The JSON files of a Hugging Face directory: obeyed, refused by name, or carried on.

Truth is transformers' own forward pass on a directory that transformers saved, and its
image processor.
"""

import json

import numpy as np
import pytest

import convert
from conversions import refusal, run
from convert import saving, verify
from convert.files import hugging_face
from samples import SMALL, error_of, random_params
from sinder_jax import checkpoint, families, vit
from sinder_jax.data import decode
from sinder_jax.model import Model

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

MEAN, STD = (0.5307, 0.5308, 0.5309), (0.2583, 0.2584, 0.2585)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# What an export of the backbone says in its own right, as there is no other truth.
REWRITTEN = {"architectures", "dtype", "mlp_ratio", "image_size", "patch_size"}


def save(folder, *, registers=0, **changes):
    """A directory as transformers saves it, with random weights, and its model."""
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    fields = SHAPE | {"image_size": 56, "patch_size": 14} | changes
    if registers:
        fields["num_register_tokens"] = registers
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}Model")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            one = float("norm" in name and name.endswith("weight") or "lambda" in name)
            weight.copy_(one + 0.1 * torch.randn(weight.shape, generator=generator))
    with verify._quiet():
        model.save_pretrained(folder)
    return model.eval()


def edit(folder, name="config.json", **changes):
    """Changes keys of a JSON file, which need not exist; `...` removes one."""
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= changes
    values = {key: value for key, value in values.items() if value is not ...}
    path.write_text(json.dumps(values))


def preprocess(folder, **changes):
    told = {"image_mean": list(MEAN), "image_std": list(STD)}
    edit(folder, "preprocessor_config.json", **told | changes)


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def distance(config, params, model):
    """RMS of the difference to transformers' tokens over their own RMS."""
    rng = np.random.default_rng(0)
    shape = (1, config.img_size, config.img_size, 3)
    images = rng.standard_normal(shape, np.float32)
    with torch.inference_mode():
        pixels = torch.from_numpy(images).movedim(-1, 1).contiguous()
        theirs = model(pixels).last_hidden_state.numpy()
    return verify.measure(verify.jax_tokens(config, params, images), theirs)[1]


# --- Keys that are obeyed, and keys that are carried on ---------------------------

HONORED = {
    "epsilon": {"layer_norm_eps": 1e-2},
    "no-epsilon": {"layer_norm_eps": 0.0},
    "heads": {"num_attention_heads": 8},
    "narrow": {"mlp_ratio": 2},
    "wide": {"mlp_ratio": 6, "use_swiglu_ffn": True},
    "narrower-than-tokens": {"mlp_ratio": 1, "use_swiglu_ffn": True},
    "registers": {"registers": 3, "layer_norm_eps": 1e-3, "mlp_ratio": 3},
    "patches": {"patch_size": [8, 8], "image_size": [50, 50]},
    "no-mask-token": {"use_mask_token": False},
    "swiglu-with-any-act": {"hidden_act": "relu", "use_swiglu_ffn": True},
    "training": {
        "drop_path_rate": 0.3,
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.1,
        "layerscale_value": 1e-5,
        "initializer_range": 0.5,
    },
    "stranger": {"organ": "liver", "stains": ["HE", {"IHC": None}], "num_labels": 3},
}


@pytest.mark.parametrize("case", HONORED)
def test_features_are_those_of_transformers_and_config_json_comes_back(case, tmp_path):
    theirs, jax, back = (tmp_path / name for name in ("theirs", "jax", "back"))
    model = save(theirs, **HONORED[case])
    run("to-jax", theirs, jax)
    config, params = checkpoint.load(jax)
    assert distance(config, params, model) < 1e-5
    run("to-torch", jax, back, "--layout=hf", "--verify")
    again, misfits = verify.load(back)
    assert not misfits
    assert distance(config, params, again) < 1e-5
    told, want = read(back), read(theirs)
    assert {key: told[key] for key in want if key not in REWRITTEN} == {
        key: value for key, value in want.items() if key not in REWRITTEN
    }
    assert told["dtype"] == "float32" and told["architectures"] == want["architectures"]
    assert again.config.mlp_ratio == model.config.mlp_ratio


def test_heads_that_are_not_written_are_transformers_default(tmp_path):
    """12, where DINOv2 has 6 at this width: a config leaves out what is the default."""
    folder = tmp_path / "hf"
    model = save(folder, hidden_size=384, num_attention_heads=12)
    edit(folder, num_attention_heads=...)
    opened = convert.open_model(folder)
    assert opened.config.num_heads == 12
    assert distance(opened.config, opened.params, model) < 1e-5


def test_epsilon_makes_a_difference_that_the_test_above_would_see(tmp_path):
    model = save(tmp_path / "theirs", layer_norm_eps=1e-2)
    edit(tmp_path / "theirs", layer_norm_eps=1e-6)
    opened = convert.open_model(tmp_path / "theirs")
    assert distance(opened.config, opened.params, model) > 1e-3


def test_a_file_of_a_directory_has_the_config_beside_it(tmp_path):
    model = save(tmp_path / "theirs", layer_norm_eps=1e-2)
    opened = convert.open_model(tmp_path / "theirs" / "model.safetensors")
    assert distance(opened.config, opened.params, model) < 1e-5


def test_a_file_of_a_classifier_becomes_a_backbone_s(tmp_path):
    save(tmp_path / "theirs")
    edit(tmp_path / "theirs", architectures=["Dinov2ForImageClassification"])
    edit(tmp_path / "theirs", dtype="float16", id2label={"0": "sound"})
    run("to-jax", tmp_path / "theirs", tmp_path / "jax")
    run("to-torch", tmp_path / "jax", tmp_path / "back", "--layout=hf")
    told = read(tmp_path / "back")
    assert told["architectures"] == ["Dinov2Model"]
    assert told["dtype"] == "float32"
    assert told["id2label"] == {"0": "sound"}


def test_a_width_of_the_ffn_that_transformers_cannot_have_is_refused(tmp_path, capsys):
    config = vit.ViTConfig(32, 1, 2, "swiglu", img_size=28, hidden_width=41)
    checkpoint.save(tmp_path / "jax", config, random_params(config))
    line = refusal(capsys, "to-torch", tmp_path / "jax", tmp_path / "hf", "--layout=hf")
    assert "the FFN is 41 wide" in line and not (tmp_path / "hf").exists()
    run("to-torch", tmp_path / "jax", tmp_path / "a.safetensors")
    assert convert.open_model(tmp_path / "a.safetensors").config == config


@pytest.mark.parametrize("hidden", [16, 33, 96, 100, 112])
def test_a_ratio_of_the_ffn_is_whole_where_it_can_be(hidden):
    config = vit.ViTConfig(32, 1, 2, "mlp", hidden_width=hidden)
    ratio = hugging_face.contents(config)["config.json"]["mlp_ratio"]
    assert int(32 * ratio) == hidden
    assert isinstance(ratio, int) == (hidden % 32 == 0)


# --- Keys that are refused --------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "hf"
    save(folder)
    return folder


@pytest.fixture
def directory(sound, tmp_path):
    (tmp_path / "hf").mkdir()
    for file in sound.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "hf"


REFUSED = {
    "hidden_act": ["relu", "gelu_new", "gelu_pytorch_tanh", None, 5],
    "qkv_bias": [False, "true", None],
    "num_channels": [1, "3"],
    "model_type": ["vit", "dinov2_with_registers_2", ["dinov2"]],
    "use_mask_token": [False, "no"],
    "layer_norm_eps": [float("nan"), float("inf"), -1e-6, "1e-6", None, 10**400],
    "num_attention_heads": [0, 3, -4, 4.0, "4", None, True, 10**30],
    "head_dim": [16, 0],
    "hidden_size": [64, "32"],
    "num_hidden_layers": [3, None],
    "image_size": [[56, 70], 28, [56], float("nan")],
    "patch_size": [16, [14, 7], {}],
    "mlp_ratio": [3, 3.9, float("nan"), "4"],
    "use_swiglu_ffn": [True, 1],
    "comment": [float("nan"), {"a": [float("inf")]}],
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_config_that_is_another_model_s_is_refused_by_its_key(key, directory, capsys):
    for value in REFUSED[key]:
        edit(directory, **{key: value})
        line = refusal(capsys, "to-jax", directory, directory.parent / "jax")
        assert key in line or key in ("num_attention_heads",) and "num_heads" in line
        assert not (directory.parent / "jax").exists()


def test_heads_that_the_user_contradicts_are_refused_with_both(directory, capsys):
    target = directory.parent / "jax"
    line = refusal(capsys, "to-jax", directory, target, "--num-heads=8")
    assert "num_heads=8 in the arguments" in line
    assert "contradicts num_attention_heads=4 in config.json" in line
    run("to-jax", directory, target, "--num-heads=4")


def test_an_edited_config_contradicts_what_our_own_file_states(tmp_path, capsys):
    config = SMALL["registers"]
    checkpoint.save(tmp_path / "jax", config, random_params(config))
    run("to-torch", tmp_path / "jax", tmp_path / "hf", "--layout=hf")
    edit(tmp_path / "hf", num_attention_heads=2)
    (tmp_path / "hf" / "model.safetensors.sha256").unlink()
    line = refusal(capsys, "inspect", tmp_path / "hf")
    assert "num_heads=1 in its metadata contradicts num_attention_heads=2" in line


# --- Image statistics -------------------------------------------------------------


def test_statistics_go_through_every_file(directory):
    preprocess(directory, size={"shortest_edge": 518}, resample=2, crop_pct=0.9)
    folder = directory.parent
    run("to-jax", directory, folder / "jax")
    statistics = families.of(checkpoint.load(folder / "jax")[0]).statistics
    assert statistics == (MEAN, STD)
    for layout, name in (("hf", "hf2"), ("dinov2", "a.safetensors"), ("timm", "t.pth")):
        run("to-torch", folder / "jax", folder / name, f"--layout={layout}")
        config = convert.open_model(folder / name).config
        assert families.of(config).statistics == (MEAN, STD)
        again = f"{name}_again"
        run("to-torch", folder / name, folder / again, "--layout=hf")
        told = read(folder / again, "preprocessor_config.json")
        assert told["image_mean"] == list(MEAN) and told["image_std"] == list(STD)
        assert told["size"] == {"shortest_edge": 518}
        assert (told["resample"], told["crop_pct"]) == (2, 0.9)


PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "do_resize": True},
    "bit": {"image_processor_type": "BitImageProcessor", "do_center_crop": False},
    "no-type": {},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_preprocessor_comes_back_without_keys_of_another(case, directory):
    size = {"height": 518, "width": 518}
    preprocess(directory, size=size, **PROCESSORS[case])
    folder = directory.parent
    run("to-jax", directory, folder / "jax")
    run("to-torch", folder / "jax", folder / "back", "--layout=hf")
    name = "preprocessor_config.json"
    assert read(folder / "back", name) == read(directory, name)


def test_dinov2_s_own_preprocessor_is_no_extra(directory):
    config = convert.open_model(directory).config
    for name, values in hugging_face.contents(config).items():
        (directory / name).write_text(json.dumps(values))
    assert "contents" not in convert.open_model(directory).provenance


def test_a_picture_is_normalized_as_by_transformers(directory):
    preprocess(directory, image_processor_type="BitImageProcessor")
    with verify._quiet():
        theirs = transformers.BitImageProcessorPil.from_pretrained(directory)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    plain = {"do_resize": False, "do_center_crop": False, "return_tensors": "np"}
    want = np.moveaxis(theirs(pixels, **plain)["pixel_values"][0], 0, -1)
    config = convert.open_model(directory).config
    got = decode.normalize(pixels, families.of(config).statistics)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_statistics_are_no_other_architecture(directory):
    plain = convert.open_model(directory)
    preprocess(directory)
    own = convert.open_model(directory)
    assert own.config != plain.config and own.digest == plain.digest
    image = verify.photograph(own.config)
    assert np.abs(image - verify.photograph(plain.config)).max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": "1/255"},
        {"do_flip_channel_order": True},
        {"offset": True},
        {"image_mean": ...},
        {"image_std": [0.2, 0.2]},
        {"image_std": [0.2, 0.2, 0.0]},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"image_mean": 0.5},
        {"image_mean": "abc"},
        {"image_std": [True, 0.2, 0.2]},
        {"image_std": [10**400, 0.2, 0.2]},
    ],
    ids=str,
)
def test_a_preprocessor_that_cannot_be_obeyed_is_refused(changes, directory, capsys):
    preprocess(directory, **changes)
    line = refusal(capsys, "inspect", directory)
    (key,) = changes
    assert "preprocessor_config.json" in line and key in line


# --- What inspect says, and the room in a file's metadata -------------------------


def test_inspect_says_what_is_unusual(tmp_path, capsys):
    save(tmp_path / "hf", layer_norm_eps=1e-5, mlp_ratio=2)
    preprocess(tmp_path / "hf")
    run("inspect", tmp_path / "hf")
    out = capsys.readouterr().out
    for part in (
        "num_attention_heads=4 in config.json",
        "epsilon 1e-05",
        "mean 0.5307 0.5308 0.5309",
        "hidden 64",
        "the FFN's hidden width is 64, DINOv2 has 128",
        "the LayerNorms' epsilon is 1e-05, DINOv2 has 1e-06",
        "images are normalized by the model's own",
    ):
        assert part in out
    config = SMALL["registers"]
    checkpoint.save(tmp_path / "jax", config, random_params(config))
    run("inspect", tmp_path / "jax")
    assert "DINOv2 has" not in capsys.readouterr().out


def test_a_config_that_is_too_long_for_metadata_stays_in_the_checkpoint(
    directory, capsys
):
    labels = {str(i): f"class number {i}" for i in range(25_000)}
    edit(directory, id2label=labels)
    folder = directory.parent
    run("to-jax", directory, folder / "jax")
    capsys.readouterr()
    run("to-torch", folder / "jax", folder / "a.safetensors")
    assert "do not fit into the file" in capsys.readouterr().out
    run("inspect", folder / "a.safetensors")
    run("to-torch", folder / "jax", folder / "back", "--layout=hf")
    assert read(folder / "back")["id2label"] == labels


@pytest.mark.parametrize("contents", [5, ["config.json"], {"config.json": [1]}])
def test_strange_contents_in_a_provenance_are_one_line(contents, tmp_path):
    config, params = SMALL["registers"], random_params(SMALL["registers"])
    checkpoint.save(tmp_path / "jax", config, params, {"contents": contents})
    assert "not objects" in error_of(convert.open_model, tmp_path / "jax")


def test_contents_of_a_provenance_name_no_other_file_and_no_field(tmp_path):
    config, params = SMALL["registers"], random_params(SMALL["registers"])
    contents = {"../evil": {"a": 1}, "config.json": {"hidden_size": 5, "b": 2}}
    model = Model.of(config, params, {"contents": contents})
    told = hugging_face.contents(config, model.provenance["contents"])
    assert told.keys() == {"config.json", "preprocessor_config.json"}
    assert told["config.json"]["hidden_size"] == 64 and told["config.json"]["b"] == 2
    assert saving.description(model, "0" * 64)
