"""DINOv2 checkpoints between PyTorch and JAX, exactly, in both directions.

    .pth / .safetensors --files--> state dict --layouts--> ViTConfig, params  and back

`from_torch` and `to_torch` work on arrays, `open_model` opens any path, and
`python -m convert` works on files.
"""

import importlib
from typing import Any

from sinder_jax import launch

launch.guard(__name__)

_HOMES = {
    "from_torch": "convert.state_dict",
    "to_torch": "convert.state_dict",
    "open_model": "convert.opening",
}
__all__ = ["from_torch", "open_model", "to_torch"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when something is converted, so that `--help` is quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
