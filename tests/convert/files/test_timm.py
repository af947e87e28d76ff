"""timm's config.json, with the keys that timm 1.0 writes and reads."""

import json

import pytest

import convert
from conversions import refusal, run
from convert.files import timm, writing
from samples import SMALL, random_params
from sinder_jax import checkpoint, families, vit

MEAN, STD = [0.5, 0.6, 0.7], [0.1, 0.2, 0.3]


def stored(folder, config, **told):
    """A model in timm's layout as `timm.save_for_hf` stores it."""
    folder.mkdir(exist_ok=True)
    state = convert.to_torch(config, random_params(config), "timm")
    writing.write_state_dict(folder / "model.safetensors", state, overwrite=True)
    (folder / "config.json").write_text(json.dumps(told))
    return folder


# paige-ai/Virchow, as published: only the architecture's name tells the heads.
VIRCHOW = vit.ViTConfig(1280, 1, 16, "swiglu", img_size=224)
ARGS = {
    "img_size": 224,
    "init_values": 1e-5,
    "num_classes": 0,
    "mlp_ratio": 5.3375,
    "global_pool": "",
    "dynamic_img_size": True,
}


def test_virchow_has_the_heads_that_its_config_says(tmp_path, capsys):
    told = {"architecture": "vit_huge_patch14_224", "model_args": ARGS}
    folder = stored(tmp_path / "virchow", VIRCHOW, **told)
    assert convert.open_model(folder).config == VIRCHOW
    assert convert.open_model(folder / "model.safetensors").config == VIRCHOW
    target = tmp_path / "jax"
    line = refusal(capsys, "to-jax", folder, target, "--num-heads=20")
    assert "num_heads=20 in the arguments contradicts" in line
    assert "architecture='vit_huge_patch14_224' in config.json" in line
    (folder / "config.json").unlink()
    line = refusal(capsys, "to-jax", folder, target)
    assert "--num-heads" in line and "1280" in line and not target.exists()
    run("to-jax", folder, target, "--num-heads=16")
    assert checkpoint.load(target)[0] == VIRCHOW


CONFIG = SMALL["registers"]  # width 64, 1 head, 4 registers, 42 pixels


def test_every_field_is_checked_and_statistics_are_obeyed(tmp_path, capsys):
    args = {
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 1,
        "patch_size": 14,
        "img_size": 42,
        "reg_tokens": 4,
        "mlp_ratio": 4.0,
        "in_chans": 3,
        "qkv_bias": True,
        "act_layer": None,
        "drop_path_rate": 0.4,
        "global_pool": "avg",
    }
    told = {"architecture": "vit_any", "pretrained_cfg": {"mean": MEAN, "std": STD}}
    folder = stored(tmp_path / "timm", CONFIG, **told, model_args=args)
    config = convert.open_model(folder).config
    assert families.of(config).statistics == (tuple(MEAN), tuple(STD))
    assert config.num_heads == 1
    for key in ("embed_dim", "depth", "patch_size", "img_size", "reg_tokens"):
        stored(folder, CONFIG, **told, model_args=args | {key: args[key] * 2})
        assert key in refusal(capsys, "inspect", folder)
    for key, value in {
        "num_heads": 3,
        "mlp_ratio": 2,
        "in_chans": 1,
        "qkv_bias": False,
        "act_layer": "relu",
        "norm_layer": "rmsnorm",
        "mlp_layer": "GluMlp",
        "attn_layer": "diff",
        "qk_norm": True,
        "pos_embed": "none",
        "init_values": 0,
        "no_embed_class": 1,
        "something_new": [1, 2],
    }.items():
        stored(folder, CONFIG, **told, model_args=args | {key: value})
        assert key in refusal(capsys, "inspect", folder) or key == "num_heads"


def test_old_files_have_the_statistics_at_the_top(tmp_path):
    folder = stored(
        tmp_path / "timm", CONFIG, architecture="vit_any", mean=MEAN, std=STD,
        model_args={"num_heads": 1},
    )  # fmt: skip
    config = convert.open_model(folder).config
    assert families.of(config).statistics == (tuple(MEAN), tuple(STD))


@pytest.mark.parametrize(
    "told",
    [
        {"model_args": 5},
        {"model_args": {"num_heads": float("nan")}},
        {"pretrained_cfg": [1]},
        {"pretrained_cfg": {"mean": [1, 2], "std": STD}},
        {"pretrained_cfg": {"std": STD}},
    ],
    ids=str,
)
def test_values_of_wrong_types_are_refused_by_name(told, tmp_path, capsys):
    folder = stored(tmp_path / "timm", CONFIG, **{"architecture": "vit_any"} | told)
    line = refusal(capsys, "inspect", folder)
    (key,) = told
    assert key in line or "mean and std" in line or "num_heads" in line


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [
        ("vit_small_patch14_dinov2", 384, 6),
        ("vit_base_patch14_reg4_dinov2.lvd142m", 768, 12),
        ("vit_large_patch16_224", 1024, 16),
        ("vit_huge_patch14_224", 1280, 16),
        ("vit_giant_patch14_dinov2", 1536, 24),
        ("vit_giant_patch14_224", 1408, 16),
        ("vit_giantopt_patch16_siglip_256", None, None),
        ("resnet50", None, None),
    ],
)
def test_the_name_of_an_architecture_tells_width_and_heads(name, width, heads):
    inferred = {"embed_dim": 64, "patch_size": 14, "ffn_layer": "mlp"}
    told = timm.statements({"architecture": name}, inferred)
    found = {statement.field: statement.value for statement in told}
    assert (found.get("embed_dim"), found.get("num_heads")) == (width, heads)
    given = {"embed_dim": 64, "num_heads": 1, "patch_size": 14, "init_values": 1}
    config = {"architecture": name, "model_args": {**given, "reg_tokens": 4}}
    told = timm.statements(config, inferred)
    assert not [x for x in told if "architecture" in x.words]  # replaced, all of it


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("vit_base_patch14_dinov2", "embed_dim"),
        ("vit_any_patch16_224", "patch_size"),
        ("vit_any_patch14_reg8_224", "num_register_tokens"),
    ],
)
def test_a_name_that_contradicts_the_tensors_is_refused(name, field, tmp_path, capsys):
    folder = stored(tmp_path / "timm", CONFIG, architecture=name)
    line = refusal(capsys, "inspect", folder)
    assert f"architecture={name!r} in config.json contradicts {field}=" in line
