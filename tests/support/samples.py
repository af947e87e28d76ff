"""Small models of every kind, and how they are compared: shared by the tests."""

import numpy as np
import pytest

import convert
from sinder_jax import param_tree, vit

SMALL = {
    "mlp": vit.ViTConfig(128, 3, 2, "mlp", img_size=56),
    "swiglu": vit.ViTConfig(64, 2, 1, "swiglu", img_size=28),
    "registers": vit.ViTConfig(64, 2, 1, "mlp", 42, 14, 4, True, 0.0),
    "swiglu-registers": vit.ViTConfig(64, 1, 1, "swiglu", 16, 8, 2, True, 0.0),
}


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
