"""Where PyTorch computes what ours is compared with: on JAX's device, as exactly.

Tensors and modules are put there one by one. `torch.set_default_device` would add
microseconds to every call of PyTorch, as long as a GPU takes to start a small kernel.
"""

import jax
import torch

from benchmarks import torch_baseline


def prepare(precision: str) -> torch.device:
    """Sets the precision of float32 products; returns the device that JAX uses.

    Args:
      precision: "highest" for float32, "high" for TF32 on a GPU.

    Raises:
      RuntimeError: JAX has an accelerator and PyTorch has none.
    """
    backend = jax.default_backend()
    if backend != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(
            f"got JAX on a {backend} and a PyTorch without CUDA, expected both on one "
            "device: install a CUDA build of PyTorch or set JAX_PLATFORMS=cpu"
        )
    torch.set_default_device(None)  # the repair's baseline sets it
    torch_baseline.set_precision(precision)
    return torch.device("cpu" if backend == "cpu" else "cuda")


def wait() -> None:
    """Waits until the GPU, if PyTorch uses one, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
