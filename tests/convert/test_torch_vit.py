import math
import subprocess
import sys

import jax
import numpy as np
import pytest

import convert
import golden
from samples import relative, timm_state
from sinder_jax import families, param_tree, vit

torch = pytest.importorskip("torch")
torch_vit = pytest.importorskip("convert.torch_vit")
torch_baseline = pytest.importorskip("benchmarks.torch_baseline")

# Stored grid 5 x 5. Every FFN, with and without registers, every way to resample.
CASES = {
    "mlp-as-plain-hub": vit.ViTConfig(32, 2, 2, "mlp", img_size=70),
    "swiglu-registers-as-hub": vit.ViTConfig(24, 2, 3, "swiglu", 70, 14, 4, True, 0.0),
    "mlp-registers-as-sinder": vit.ViTConfig(32, 2, 4, "mlp", 70, 14, 2, True, 0.1),
    "swiglu-neither": vit.ViTConfig(40, 1, 2, "swiglu", 40, 8, 0, False, 0.0),
}
# Rows and columns of patches.
GRIDS = {"stored": (5, 5), "wide": (3, 9), "one-side-stored": (8, 5)}

# RMS of the difference over the RMS of the features. float32's epsilon times depth is
# at most 1e-6; the planted FFNs of `moving` amplify a rounding by 30 (measured).
TOLERANCE = 3e-6
AMPLIFIED = 1e-4

each_case = pytest.mark.parametrize("case", CASES)
each_recording = pytest.mark.parametrize("name", golden.NAMES)


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


def tensors(state):
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def random_images(config, rows, columns, count=2):
    sides = rows * config.patch_size, columns * config.patch_size
    rng = np.random.default_rng(rows)
    return rng.standard_normal((count, *sides, 3)).astype(np.float32)


def resampled(config, state, rows, columns):
    """The tensors with a position embedding for another grid than the stored one."""
    positions, side = state["pos_embed"], config.grid_size
    grid = torch_baseline.resample_positions(
        positions[0, -(side**2) :].unflatten(0, (side, side)),
        rows,
        columns,
        antialias=config.interpolate_antialias,
        offset=config.interpolate_offset,
    )
    rest = positions[:, : -(side**2)]  # the class token's; timm may have none
    return state | {"pos_embed": torch.cat([rest, grid.flatten(0, 1)[None]], dim=1)}


def features(config, state, images):
    grid = [side // config.patch_size for side in images.shape[1:3]]
    tokens = torch_vit.features(
        resampled(config, state, *grid),
        torch.from_numpy(np.array(images)).movedim(-1, 1),
        num_heads=config.num_heads,
        norm_epsilon=families.of(config).norm_epsilon,
    )
    assert tokens.shape[1] == 1 + config.num_register_tokens + math.prod(grid)
    cls, registers, patches = tokens.split(
        [1, config.num_register_tokens, math.prod(grid)], dim=1
    )
    return vit.Features(cls[:, 0], registers, patches.unflatten(1, grid))


# --- Against the authors' code ----------------------------------------------------


def recorded(arrays):
    """The recorded features, registers empty where there are none."""
    cls = arrays["features/x_norm_clstoken"]
    empty = np.zeros((len(cls), 0, cls.shape[-1]), np.float32)
    registers = arrays.get("features/x_norm_regtokens", empty)
    return cls, registers, arrays["features/x_norm_patchtokens"]


@each_recording
def test_features_match_the_recorded_ones_and_no_other_image_s(name):
    arrays, meta = golden.load(name)
    config = vit.ViTConfig(**golden.architecture(meta))
    state, images = tensors(golden.state(arrays)), arrays["images"]
    out = features(config, state, np.moveaxis(images, 1, -1))
    patches = images.shape[2] // 14, images.shape[3] // 14
    assert out.patches.shape[1:3] == patches
    got, want = (out.cls, out.registers, out.patches.flatten(1, 2)), recorded(arrays)
    tolerance = AMPLIFIED if name == "moving" else TOLERANCE
    for part, stored in zip(got, want, strict=True):
        if stored.size:
            assert relative(part, stored) < tolerance
    assert relative(got[2].roll(1, 0), want[2]) > 0.01
    assert out.registers.shape[1] == config.num_register_tokens


# --- Against the JAX model --------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@each_case
def test_features_match_the_jax_model(case, grid):
    config, (rows, columns) = CASES[case], GRIDS[grid]
    params = random_params(config)
    images = random_images(config, rows, columns)
    want = jax.jit(vit.ViT(config).apply)({"params": params}, images)
    got = features(config, tensors(convert.to_torch(config, params)), images)
    for part, expected in zip(got, want, strict=True):
        if expected.size:
            assert relative(part, expected) < TOLERANCE


# --- timm's layout ----------------------------------------------------------------


@each_case
def test_timm_layout_gives_the_same_bytes_as_the_hub_s(case):
    config = CASES[case]
    state = tensors(convert.to_torch(config, random_params(config)))
    images = random_images(config, 3, 9)
    hub = features(config, state, images)
    timm = features(config, timm_state(state), images)
    for part, expected in zip(timm, hub, strict=True):
        assert torch.equal(part, expected)


def test_timm_class_token_without_its_position_is_another_model():
    config = CASES["swiglu-registers-as-hub"]
    state = tensors(convert.to_torch(config, random_params(config)))
    images = random_images(config, 5, 5)
    wrong = timm_state(state) | {"cls_token": state["cls_token"]}
    want = features(config, state, images)
    assert relative(features(config, wrong, images).cls, want.cls) > 1e-3


# --- What does not fit ------------------------------------------------------------


def test_missing_tensor_is_named():
    config = CASES["mlp-as-plain-hub"]
    state = tensors(convert.to_torch(config, random_params(config)))
    del state["blocks.1.ls2.gamma"]
    with pytest.raises(KeyError, match=r"blocks\.1\.ls2\.gamma"):
        features(config, state, random_images(config, 5, 5))


def test_converter_and_verification_import_without_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "import convert.__main__, convert.verify, convert.commands.to_jax; print('yes')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "yes\n"
