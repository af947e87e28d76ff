"""benchmarks/torch_device.py: PyTorch never computes on another kind of device."""

import jax
import pytest

torch = pytest.importorskip("torch")
from benchmarks import torch_baseline, torch_device  # noqa: E402


@pytest.fixture(autouse=True)
def left_as_found():
    precision = torch.get_float32_matmul_precision()
    allowed = torch.backends.cudnn.allow_tf32
    yield
    torch.set_default_device(None)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = allowed


def accelerator(monkeypatch, cuda):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)


def test_both_are_on_the_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device.prepare("highest").type == "cpu"


def test_both_are_on_the_gpu(monkeypatch):
    accelerator(monkeypatch, cuda=True)
    assert torch_device.prepare("highest").type == "cuda"


def test_a_pytorch_without_cuda_is_not_compared_with_a_gpu(monkeypatch):
    accelerator(monkeypatch, cuda=False)
    with pytest.raises(RuntimeError, match="PyTorch without CUDA"):
        torch_device.prepare("highest")


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_and_convolutions_are_tf32_for_high_only(precision):
    torch_device.prepare(precision)
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "high")
    assert torch.backends.cudnn.allow_tf32 == (precision == "high")


def test_a_default_device_of_before_is_gone():
    torch_baseline.set_device(True)
    torch_device.prepare("highest")
    assert not torch.overrides._get_current_function_mode_stack()
