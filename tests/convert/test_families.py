"""DINOv2's relatives, row by row: to JAX and back, against an independent forward pass.

Random models stand in for the published ones, narrow and shallow; names, grids, patch
sizes, registers, positions, FFN and statistics are the published ones'.
"""

import json

import numpy as np
import pytest

import convert
from conversions import refusal, run
from convert import infer, layouts, verify
from convert.files import writing
from samples import assert_same_bytes, error_of, numpy_state, read_state_dict
from sinder_jax import checkpoint, defects, factor, families, param_tree, vit
from sinder_jax.analysis import forecast
from sinder_jax.model import differences

torch = pytest.importorskip("torch")
WIDTH, HEADS, DEPTH = 96, 3, 2
IMAGENET = families.FAMILIES["dinov2"].statistics
PATHOLOGY = [[0.707223, 0.578729, 0.703617], [0.211883, 0.230117, 0.177517]]
DINOV2_RATIO = 2.66667 * 2
# timm's arguments, as the model cards give them, but for the sizes. `swiglu` stands for
# the classes that no JSON file holds: SwiGLUPacked and SiLU.
TIMM = {
    "H-optimus": {
        "architecture": "vit_giant_patch14_reg4_dinov2",
        "init_values": 1e-5,
        "dynamic_img_size": False,
    },
    "UNI": {
        "architecture": "vit_large_patch16_224",
        "patch_size": 16,
        "init_values": 1e-5,
        "dynamic_img_size": True,
    },
    "UNI2-h": {
        "architecture": "vit_giant_patch14_224",
        "patch_size": 14,
        "init_values": 1e-5,
        "mlp_ratio": DINOV2_RATIO,
        "no_embed_class": True,
        "reg_tokens": 8,
        "swiglu": True,
        "dynamic_img_size": True,
    },
    "Virchow": {
        "architecture": "vit_huge_patch14_224",
        "init_values": 1e-5,
        "mlp_ratio": 5.3375,
        "dynamic_img_size": True,
        "swiglu": True,
        "global_pool": "",
    },
    "Virchow2": {
        "architecture": "vit_huge_patch14_224",
        "init_values": 1e-5,
        "mlp_ratio": 5.3375,
        "dynamic_img_size": True,
        "swiglu": True,
        "global_pool": "",
        "reg_tokens": 4,
    },
    "Prov-GigaPath": {
        "architecture": "vit_giant_patch14_dinov2",
        "patch_size": 16,
        "init_values": 1e-5,
        "mlp_ratio": 5.33334,
    },
    "GPFM": {"architecture": "vit_large_patch14_dinov2"},
    "no-layer-scale": {"architecture": "vit_base_patch16_224"},
    "patches-alone": {"architecture": "vit_base_patch16_224", "no_embed_class": True},
}
# Of `pretrained_cfg`; the others have ImageNet's.
STATISTICS = {"H-optimus": PATHOLOGY}
SIZES = {
    "img_size": 224,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": 0,
}


def timm_model(name, **changes):
    """timm's own module with random weights, and its config.json."""
    from timm_models import SwiGLUPacked, timm

    args = {**SIZES, **TIMM[name], **changes}
    architecture, swiglu = args.pop("architecture"), args.pop("swiglu", False)
    classes = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if swiglu else {}
    model = timm.create_model(architecture, **args, **classes).eval()
    fill(model)
    mean, std = STATISTICS.get(name, IMAGENET)
    told = {
        "architecture": architecture,
        "model_args": args,
        "pretrained_cfg": {"mean": list(mean), "std": list(std)},
    }
    return model, told


def fill(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * 0.1)
            if name.endswith(("gamma", "lambda1", "norm.weight")):
                x.add_(0.5)


def write(folder, state, **contents):
    folder.mkdir()
    writing.write_state_dict(folder / "model.safetensors", state)
    for name, told in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(told))
    return folder


def pixels(size, count=2):
    rng = np.random.default_rng(1)
    return rng.uniform(0, 1, (count, size, size, 3)).astype(np.float32)


def normalized(images, statistics):
    mean, std = (np.array(x, np.float32) for x in statistics)
    return (images - mean) / std


def our_tokens(config, params, images):
    """Tokens after the final norm, by our own statistics."""
    images = normalized(images, families.of(config).statistics)
    return verify.jax_tokens(config, params, images)


def their_tokens(forward, images, statistics):
    images = normalized(images, statistics)
    with torch.inference_mode():
        return forward(torch.from_numpy(images).movedim(-1, 1)).numpy()


def relative(got, want):
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def check_round_trip(source, target, layout, *options):
    """To JAX and back by the commands; the tensors of the source, byte for byte."""
    run("to-jax", source, target / "jax", *options)
    back = target / ("back" if layout == "hf" else "back.safetensors")
    run("to-torch", target / "jax", back, f"--layout={layout}")
    want, got = read_state_dict(source), read_state_dict(back)
    assert convert.open_model(back).config == checkpoint.load(target / "jax")[0]
    got = {key: got[key] for key in want} | got
    if layout == "hf" or "mask_token" in want:
        got = {key: x for key, x in got.items() if key in want or "mask" not in key}
    assert_same_bytes(got, want)
    return checkpoint.load(target / "jax")


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_come_back_and_compute_the_same(name, tmp_path, capsys):
    model, told = timm_model(name)
    statistics = STATISTICS.get(name, IMAGENET)
    source = write(tmp_path / "timm", numpy_state(model.state_dict()), config=told)
    config, params = check_round_trip(source, tmp_path, "timm")
    assert "no file tells mean" not in capsys.readouterr().out
    run("inspect", tmp_path / "back.safetensors")  # which has no config.json beside it
    assert (
        "mean and standard deviation" not in capsys.readouterr().out.split("note:")[0]
    )
    images = pixels(224)
    got = our_tokens(config, params, images)
    assert (
        relative(got, their_tokens(model.forward_features, images, statistics)) < 1e-5
    )
    # Other statistics make other features, and another patch size is refused.
    wrong = their_tokens(model.forward_features, images, ([0.5] * 3, [0.5] * 3))
    assert relative(got, wrong) > 1e-3
    told["model_args"]["patch_size"] = 32
    (source / "config.json").write_text(json.dumps(told))
    line = refusal(capsys, "to-jax", source, tmp_path / "wrong")
    assert "patch_size=32 in model_args of config.json contradicts" in line


@pytest.mark.parametrize("name", ["UNI2-h", "Virchow2", "no-layer-scale"])
def test_the_method_runs_on_timm_models(name):
    model, _ = timm_model(name, depth=1)
    state = numpy_state(model.state_dict())
    config, params = convert.from_torch(state, HEADS)
    assert forecast.forecast(config, params).gaps.shape == (1,)
    factors = factor.factorize(config, params)
    eps = {key: np.full_like(x, 0.01) for key, x in factors.sigma.items()}
    merged = factor.merge(params, factors, eps)
    made = convert.to_torch(config, merged, "timm")
    assert list(made) and made.keys() == state.keys()
    assert np.isfinite(defects.block_map(config, merged, 0)).all()


@pytest.mark.parametrize("name", ["Virchow2", "no-layer-scale", "patches-alone"])
@pytest.mark.parametrize("layout", ["dinov2", "hf"])
def test_timm_models_compute_the_same_in_other_layouts(name, layout, tmp_path, capsys):
    model, told = timm_model(name, img_size=112)
    source = write(tmp_path / "timm", numpy_state(model.state_dict()), config=told)
    target = tmp_path / ("hf" if layout == "hf" else "hub.safetensors")
    run("to-torch", source, target, f"--layout={layout}", "--verify")
    out = capsys.readouterr().out
    assert "agree with" in out and ("for good" in out) == (name == "Virchow2")
    run("to-jax", target, tmp_path / "jax")
    config, params = checkpoint.load(tmp_path / "jax")
    assert config.positions == "class"
    images = pixels(112)
    want = their_tokens(model.forward_features, images, IMAGENET)
    got = our_tokens(config, params, images)
    assert relative(got, want) < 1e-5
    run("to-jax", source, tmp_path / "unfolded")
    own = our_tokens(*checkpoint.load(tmp_path / "unfolded"), images)
    # What a layout folds away changes the order of two sums at most.
    assert relative(got, own) < 1e-6


# At their published sizes: names and shapes alone.
PUBLISHED = {
    "H-optimus-0": "H-optimus",
    "UNI": "UNI",
    "UNI2-h": "UNI2-h",
    "Virchow": "Virchow",
    "Virchow2": "Virchow2",
    "Prov-GigaPath": "Prov-GigaPath",
    "GPFM": "GPFM",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_at_the_published_sizes_are_timm_s(name):
    from timm_models import SwiGLUPacked, timm

    relative = families.RELATIVES[name]
    config = vit.ViTConfig(**relative.fields)
    args = dict(TIMM[PUBLISHED[name]])
    classes = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    args |= classes if args.pop("swiglu", False) else {}
    given = {"embed_dim": config.embed_dim, "depth": config.depth}
    model = timm.create_model(
        args.pop("architecture"),
        **args,
        **given,
        num_heads=config.num_heads,
        img_size=224,
        num_classes=0,
        weight_init="skip",
        device="meta",
    )
    want = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    table = layouts.table_of("timm", config)
    assert {key: slot.shape for key, slot in table.items()} == want
    assert infer.layout_of(want) == "timm"
    statements = infer.statements_of("timm", want, config.num_heads)
    assert not differences(infer.config_from(statements), config)
    assert name in infer.same_shapes(config)


# --- transformers ---------------------------------------------------------------------

# Dinov2Config's fields, and image_mean and image_std of preprocessor_config.json; None
# where there is no such file.
HF = {
    "RAD-DINO": ({"image_size": 70, "patch_size": 14}, [[0.5307] * 3, [0.2583] * 3]),
    "Web-DINO": (
        {
            "image_size": 56,
            "patch_size": 14,
            "use_swiglu_ffn": True,
            "layer_norm_eps": 1e-6,
        },
        IMAGENET,
    ),
    "Phikon-v2": ({"image_size": 64, "patch_size": 16}, IMAGENET),
    "midnight": ({"image_size": 56, "patch_size": 14, "use_swiglu_ffn": True}, None),
}


def transformers_model(kind, **fields):
    import transformers

    sizes = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    }  # fmt: skip
    config = transformers.Dinov2Config(**sizes, **fields)
    model = getattr(transformers, kind)(config).eval()
    fill(model)
    return model


def write_transformers(folder, model, statistics, prefix=""):
    model.save_pretrained(folder)
    if statistics:
        mean, std = map(list, statistics)
        told = {"image_mean": mean, "image_std": std, "do_normalize": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("name", HF)
def test_transformers_models_come_back_and_compute_the_same(name, tmp_path, capsys):
    fields, statistics = HF[name]
    model = transformers_model("Dinov2Model", **fields)
    source = write_transformers(tmp_path / "hf", model, statistics)
    options = []
    if statistics is None:  # midnight's card says 0.5, its files nothing
        statistics = [[0.5] * 3, [0.5] * 3]
        capsys.readouterr()
        run("inspect", source)
        assert "not told:      mean and standard deviation" in capsys.readouterr().out
        options = ["--mean=0.5,0.5,0.5", "--std=0.5,0.5,0.5"]
    config, params = check_round_trip(source, tmp_path, "hf", *options)
    assert config.patch_size == fields["patch_size"]
    images = pixels(fields["image_size"])
    got = our_tokens(config, params, images)

    def last(pixels):
        return model(pixels).last_hidden_state

    assert relative(got, their_tokens(last, images, statistics)) < 1e-5
    assert relative(got, their_tokens(last, images, ([0.4] * 3, [0.4] * 3))) > 1e-3
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(told | {"patch_size": 28}))
    line = refusal(capsys, "to-jax", source, tmp_path / "wrong")
    assert "patch_size=28 in config.json contradicts" in line


def test_a_classifier_s_head_survives_a_change_of_backbone(tmp_path, capsys):
    model = transformers_model(
        "Dinov2ForImageClassification", image_size=56, patch_size=14, num_labels=5
    )
    source = write_transformers(tmp_path / "hf", model, IMAGENET)
    capsys.readouterr()
    run("to-jax", source, tmp_path / "jax", "--verify")
    out = capsys.readouterr().out
    assert "classifier (2)" in out and "agree with transformers" in out
    run("to-torch", tmp_path / "jax", tmp_path / "same", f"--into={source}")
    assert_same_bytes(read_state_dict(tmp_path / "same"), read_state_dict(source))
    # Another backbone, the same head.
    config, params = checkpoint.load(tmp_path / "jax")
    params["norm"]["bias"] = params["norm"]["bias"] + 1
    params["blocks"]["mlp"]["fc1"]["kernel"] *= 2
    checkpoint.save(tmp_path / "other", config, params)
    run("to-torch", tmp_path / "other", tmp_path / "new", f"--into={source}")
    got, want = read_state_dict(tmp_path / "new"), read_state_dict(source)
    changed = {key for key in want if got[key].tobytes() != want[key].tobytes()}
    assert changed == {
        "dinov2.layernorm.bias",
        *(f"dinov2.encoder.layer.{i}.mlp.fc1.weight" for i in range(DEPTH)),
    }
    np.testing.assert_array_equal(
        param_tree.flatten(convert.open_model(tmp_path / "new").params)["norm/bias"],
        params["norm"]["bias"],
    )


def test_the_backbone_of_a_depth_model_of_transformers_is_read(tmp_path, capsys):
    import transformers

    backbone = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=HEADS,
        image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], layer_norm_eps=1e-5,
        reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=WIDTH,
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    fill(model)
    source = write_transformers(tmp_path / "hf", model, IMAGENET)
    capsys.readouterr()
    run("to-jax", source, tmp_path / "jax")
    assert "neck (" in capsys.readouterr().out
    found, params = checkpoint.load(tmp_path / "jax")
    assert (found.num_heads, found.norm_epsilon) == (HEADS, 1e-5)
    images = pixels(56)

    def last(pixels):
        return model.backbone.layernorm(
            model.backbone(pixels, output_hidden_states=True).hidden_states[-1]
        )

    want = their_tokens(last, images, IMAGENET)
    assert relative(our_tokens(found, params, images), want) < 1e-5
    run("to-torch", tmp_path / "jax", tmp_path / "back", f"--into={source}")
    assert_same_bytes(read_state_dict(tmp_path / "back"), read_state_dict(source))


def test_a_backbone_s_checkpoint_is_read(tmp_path):
    model = transformers_model("Dinov2Backbone", image_size=56, patch_size=14)
    source = write_transformers(tmp_path / "hf", model, IMAGENET)
    check_round_trip(source, tmp_path, "hf")


# --- The hub's names, and backbones inside other models -------------------------------


def hub_state(*, swiglu, registers=0, grid=4, chunks=0):
    """A state dict with the hub's names, without the project's tables."""
    from hub_module import Hub

    torch.manual_seed(0)
    model = Hub(WIDTH, DEPTH * 2, swiglu, registers, positions=1 + grid**2)
    fill(model)
    state = numpy_state(model.state_dict())
    if chunks:
        state = {
            key.replace(f"blocks.{i}.", f"blocks.{i // chunks}.{i}.")
            if key.startswith(f"blocks.{i}.")
            else key: x
            for i in range(DEPTH * 2)
            for key, x in state.items()
            if key.startswith(f"blocks.{i}.") or (i == 0 and "blocks" not in key)
        }
    return state


HEAD = {
    "depth_head.projects.0.weight": np.arange(6, dtype=np.float32),
    "depth_head.norm.num_batches_tracked": np.array(3, np.int64),
    "aggregator.frame_blocks.0.attn.qkv.weight": np.ones((2, 2), np.float16),
}
# Prefix, head, and further arguments of `hub_state`.
INSIDE = {
    "Franca": ("teacher.backbone.", {}, {"swiglu": True, "chunks": 4}),
    "Depth-Anything-V2": ("pretrained.", HEAD, {"swiglu": False}),
    "VGGT": ("aggregator.patch_embed.", HEAD, {"swiglu": False, "registers": 4}),
    "one-register": ("any.words.", HEAD, {"swiglu": False, "registers": 1}),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_backbone_inside_another_model(name, tmp_path, capsys):
    from convert import torch_vit

    prefix, head, kind = INSIDE[name]
    bare = hub_state(**kind)
    state = {prefix + key: x for key, x in bare.items()} | head
    source = tmp_path / "whole.safetensors"
    writing.write_state_dict(source, state)
    capsys.readouterr()
    run("to-jax", source, tmp_path / "jax", f"--num-heads={HEADS}")
    out = capsys.readouterr().out
    assert not head or "depth_head (2), aggregator;" in out
    back = tmp_path / "back.safetensors"
    run("to-torch", tmp_path / "jax", back, f"--into={source}")
    assert_same_bytes(read_state_dict(back), read_state_dict(source))
    config, params = checkpoint.load(tmp_path / "jax")
    plain = hub_state(**kind | {"chunks": 0})
    tensors = {key: torch.from_numpy(x) for key, x in plain.items()}
    images = pixels(config.img_size)
    want = their_tokens(
        lambda x: torch_vit.features(tensors, x, num_heads=HEADS, norm_epsilon=1e-6),
        images,
        IMAGENET,
    )
    assert relative(our_tokens(config, params, images), want) < 1e-5
    assert config.num_register_tokens == kind.get("registers", 0)
    # Another prefix, or another patch size, is refused.
    line = refusal(capsys, "to-jax", source, tmp_path / "wrong", "--prefix=student")
    assert "got prefix 'student'" in line and repr(prefix) in line
    got = our_tokens(config, params, images + 0.5)
    assert relative(got, want) > 1e-3
    message = error_of(convert.from_torch, state, HEADS, patch_size=16)
    assert "patch_size=16 in the arguments contradicts patch_size=14" in message


def test_two_backbones_are_not_chosen_between(tmp_path, capsys):
    state = hub_state(swiglu=False)
    both = {f"{x}.{key}": y for x in ("left", "right") for key, y in state.items()}
    both["left.cls_token"] = both["left.cls_token"] + 1
    source = tmp_path / "both.safetensors"
    writing.write_state_dict(source, both)
    heads = f"--num-heads={HEADS}"
    line = refusal(capsys, "to-jax", source, tmp_path / "jax", heads)
    assert "2 backbones" in line and "'left.' or 'right.'" in line
    run("to-jax", source, tmp_path / "jax", heads, "--prefix=left")
    _, params = checkpoint.load(tmp_path / "jax")
    np.testing.assert_array_equal(params["cls_token"], both["left.cls_token"])
