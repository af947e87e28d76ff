import json

import pytest

from benchmarks import timing
from sinder_jax import vit


def test_features_are_those_of_pytorch():
    pytest.importorskip("torch")
    from benchmarks import features, torch_device

    config = vit.ViTConfig(64, 2, 2, "swiglu", img_size=42)
    case = features.Case(config, 3, torch_device.prepare("highest"))
    numbers = case.times("highest", 1)
    # float32's rounding through two blocks; 6e-7 measured for S
    assert numbers["largest relative difference"] < 1e-5
    assert numbers["images/s"].keys() == {"PyTorch", "ours"}


def test_another_model_differs():
    """Negative control."""
    pytest.importorskip("torch")
    from benchmarks import features, torch_device

    config = vit.ViTConfig(64, 2, 2, "swiglu", img_size=42)
    case = features.Case(config, 3, torch_device.prepare("highest"))
    case._state["norm.weight"] = case._state["norm.weight"] * 1.01
    assert case.times("highest", 1)["largest relative difference"] > 1e-3


def test_a_part_is_told_at_once(capsys):
    timing.tell("S", {"seconds": {"ours": 0.5}})
    out, err = capsys.readouterr()
    assert not out and json.loads(err) == {"S": {"seconds": {"ours": 0.5}}}
