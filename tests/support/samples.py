"""Small models of every kind, and how they are compared: shared by the tests."""

import numpy as np
import pytest

import convert
from convert.files import reading
from sinder_jax import param_tree, vit

SMALL = {
    "mlp": vit.ViTConfig(128, 3, 2, "mlp", img_size=56),
    "swiglu": vit.ViTConfig(64, 2, 1, "swiglu", img_size=28),
    "registers": vit.ViTConfig(64, 2, 1, "mlp", 42, 14, 4, True, 0.0),
    "swiglu-registers": vit.ViTConfig(64, 1, 1, "swiglu", 16, 8, 2, True, 0.0),
}


def awkward_kernels():
    """Kernels [in, out] that an SVD may stumble over, by what is awkward."""
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.standard_normal((9, 9)))[0]
    row_space = np.linalg.qr(rng.standard_normal((20, 9)))[0].T
    return {
        "tall": rng.standard_normal((40, 6)),
        "wide": rng.standard_normal((6, 40)),
        "square": rng.standard_normal((9, 9)),
        "one-column": rng.standard_normal((9, 1)),
        "one-row": rng.standard_normal((1, 9)),
        "rank-deficient": rng.standard_normal((9, 2)) @ rng.standard_normal((2, 7)),
        "zero": np.zeros((5, 4)),
        "equal-singular-values": 3 * q,
        "close-singular-values": q @ np.diag(1 + 1e-7 * np.arange(9)) @ q.T,
        "spread-singular-values": q @ np.diag(10.0 ** -np.arange(9)),
        # the Gram matrix's square loses what is below 1e-8 of the largest
        "wide-spread": q @ np.diag(10.0 ** -np.arange(9)) @ row_space,
        "tall-spread": row_space.T @ np.diag(10.0 ** -np.arange(9)) @ q,
    }


AWKWARD = awkward_kernels()


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = param_tree.flatten(param_tree.shapes(config))
    return param_tree.unflatten(
        {
            path: rng.standard_normal(leaf.shape, np.float32)
            for path, leaf in shapes.items()
        }
    )


def random_state(config, seed=0):
    return convert.to_torch(config, random_params(config, seed))


def timm_state(state):
    """The same model as timm names it, from the names of the hub."""
    names = {"register_tokens": "reg_token", ".w12.": ".fc1.", ".w3.": ".fc2."}
    timm = {}
    for name, array in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        timm[name] = array
    del timm["mask_token"]
    if "reg_token" in timm:
        timm["cls_token"] = timm["cls_token"] + timm["pos_embed"][:, :1]
        timm["pos_embed"] = timm["pos_embed"][:, 1:]
    return timm


def relative(actual, expected):
    """Norm of the difference over the norm of the expected array, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


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


def numpy_state(state):
    """A PyTorch state dict as NumPy arrays."""
    return {key: tensor.detach().numpy() for key, tensor in state.items()}


def read_state_dict(path):
    """All tensors of a PyTorch file or Hugging Face directory, read at once."""
    return dict(reading.open_state_dict(path))
