"""families.py: the published models, hidden widths, and what a new row needs."""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

import convert
from loading import loaded
from samples import error_of
from sinder_jax import checkpoint, families, param_tree, vit

DINOV2 = families.FAMILIES["dinov2"]
OTHER = dataclasses.replace(
    DINOV2,
    patch_size=16,
    image_size=64,
    norm_epsilon=1e-2,
    statistics=families.Statistics((0.5, 0.6, 0.7), (0.1, 0.2, 0.3)),
    hidden_widths={"mlp": families.HiddenWidth(Fraction(3))},
    variants=(families.Variant("", "", 8, True, 0.0),),
)


@pytest.fixture
def other(monkeypatch):
    """A ninth model's config, of a family that is not DINOv2."""
    monkeypatch.setitem(families.FAMILIES, "other", OTHER)
    return vit.ViTConfig(64, 2, 1, "mlp", 64, 16, 8, True, 0.0, family="other")


def test_the_published_models_are_dinov2_s_eight():
    names = [f"dinov2_vit{x}14{reg}" for reg in ("", "_reg") for x in "sbgl"]
    assert sorted(families.published()) == sorted(names)
    giant = families.published()["dinov2_vitg14_reg"]
    assert giant.alias == "dinov2_vitg14_reg4"
    assert giant.hub_url == "https://dl.fbaipublicfiles.com/dinov2"
    assert giant.file == "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    assert vit.CONFIGS["dinov2_vitg14_reg"] == vit.ViTConfig(
        1536, 40, 24, "swiglu", 518, 14, 4, True, 0.0
    )
    assert vit.CONFIGS["dinov2_vits14"] == vit.ViTConfig(384, 12, 6, "mlp")


def test_a_config_s_defaults_are_those_of_its_family():
    config = vit.ViTConfig(64, 1, 1, "mlp")
    plain = DINOV2.variant(0)
    assert (config.patch_size, config.img_size) == (14, 518)
    assert families.of(config) is DINOV2
    assert DINOV2.patch_size == 14 and DINOV2.image_size == 518
    assert config.interpolate_antialias == plain.interpolate_antialias
    assert config.interpolate_offset == plain.interpolate_offset


@pytest.mark.parametrize("embed_dim", [4, 64, 100, 384, 1280, 1536, 4096, 4095])
def test_hidden_widths_follow_dinov2_s_arithmetic(embed_dim):
    widths = DINOV2.hidden_widths
    assert widths["mlp"](embed_dim) == 4 * embed_dim
    swiglu = (int(4 * embed_dim * 2 / 3) + 7) // 8 * 8  # SwiGLUFFNFused
    assert widths["swiglu"](embed_dim) == swiglu


@pytest.mark.parametrize("registers, suffix", [(0, ""), (1, "_reg"), (4, "_reg")])
def test_the_nearest_variant_has_registers_where_the_model_has(registers, suffix):
    assert DINOV2.variant(registers).suffix == suffix


def test_unknown_family_names_the_nearest():
    want = "got family 'dinov3', expected dinov2"
    assert error_of(families.named, "dinov3") == want
    assert error_of(vit.ViTConfig, 64, 1, 1, "mlp", family="dinov3") == want


def test_dinov2_s_name_is_not_stored_and_another_s_is(other):
    config = vit.ViTConfig(64, 2, 1, "mlp")
    assert "family" not in config.as_dict()
    assert vit.ViTConfig(**config.as_dict()) == config
    assert other.as_dict()["family"] == "other"
    assert vit.ViTConfig(**other.as_dict()) == other


def test_families_need_neither_jax_nor_numpy():
    assert not {"jax", "numpy"} & loaded("sinder_jax.families")[1]


# --- A new row ------------------------------------------------------------------------


def test_a_new_family_s_model_uses_its_own_numbers(other):
    shapes = param_tree.flatten(param_tree.shapes(other))
    assert shapes["blocks/mlp/fc1/kernel"].shape == (2, 64, 192)
    assert shapes["patch_embed/kernel"].shape == (16, 16, 3, 64)
    params = random_params(shapes)
    params["norm"] = {"scale": np.ones(64, "f"), "bias": np.zeros(64, "f")}
    images = np.random.default_rng(0).normal(size=(1, 32, 64, 3)).astype(np.float32)
    as_dinov2 = dataclasses.replace(other, family="dinov2")
    assert as_dinov2.hidden_dim != other.hidden_dim
    out = vit.ViT(other).apply({"params": params}, jnp.asarray(images))
    assert out.patches.shape == (1, 2, 4, 64) and out.registers.shape == (1, 8, 64)
    # The last norm's variance is that of its tokens, over itself plus epsilon.
    (tokens,) = vit.ViT(other).apply(
        {"params": params}, jnp.asarray(images), blocks=(1,), method="intermediates"
    )
    variance = np.var(np.asarray(tokens, np.float64)[:, 9:], axis=-1)
    got = np.var(np.asarray(out.patches, np.float64), axis=-1).reshape(1, -1)
    np.testing.assert_allclose(got, variance / (variance + 1e-2), rtol=1e-4)


def test_a_new_family_travels_through_files(other, tmp_path):
    params = random_params(param_tree.flatten(param_tree.shapes(other)))
    checkpoint.save(tmp_path / "model", other, params)
    assert checkpoint.load(tmp_path / "model")[0] == other
    state = convert.to_torch(other, params)
    config, back = convert.from_torch(state, family="other")
    assert config == other
    for path, leaf in param_tree.flatten(back).items():
        np.testing.assert_array_equal(leaf, param_tree.flatten(params)[path])


@pytest.mark.parametrize("layout", OTHER.layouts)
def test_files_of_a_family_without_layer_scale_have_none(layout, other, monkeypatch):
    plain = dataclasses.replace(OTHER, layer_scale=False)
    monkeypatch.setitem(families.FAMILIES, "other", plain)
    params = random_params(param_tree.flatten(param_tree.shapes(other)))
    for name in ("ls1", "ls2"):
        params["blocks"][name]["gamma"] = np.ones((2, 64), np.float32)
    state = convert.to_torch(other, params, layout=layout)
    found = [key for key in state if "gamma" in key or "lambda" in key]
    assert len(found) == (4 if layout == "hf" else 0)  # transformers' always have it
    config, back = convert.from_torch(state, family="other")
    assert config == other
    for name in ("ls1", "ls2"):
        np.testing.assert_array_equal(
            back["blocks"][name]["gamma"], params["blocks"][name]["gamma"]
        )
    # DINOv2 has LayerScale, unless none of its tensors is there.
    as_dinov2, _ = convert.from_torch(state, 1)
    assert families.of(as_dinov2).layer_scale == (layout == "hf")
    if layout != "hf":
        state["blocks.1.ls2.gamma"] = np.ones(64, np.float32)
        with pytest.raises(ValueError, match="3 missing"):
            convert.from_torch(state, 1)


def test_a_layout_in_which_a_family_is_not_published_is_refused(other, monkeypatch):
    hub_only = dataclasses.replace(OTHER, layouts=("dinov2",))
    monkeypatch.setitem(families.FAMILIES, "other", hub_only)
    params = random_params(param_tree.flatten(param_tree.shapes(other)))
    convert.to_torch(other, params, layout="dinov2")
    with pytest.raises(ValueError, match="unknown layout 'timm'; use 'dinov2'"):
        convert.to_torch(other, params, layout="timm")


def random_params(shapes):
    rng = np.random.default_rng(1)
    return param_tree.unflatten(
        {
            path: rng.normal(0, 0.1, leaf.shape).astype(np.float32)
            for path, leaf in shapes.items()
        }
    )
