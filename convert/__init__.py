"""DINOv2 checkpoints between PyTorch and JAX, exactly, in both directions.

    .pth / .safetensors --io--> state dict --names--> (ViTConfig, params)  and back

`from_torch` and `to_torch` work on arrays, `python -m convert` on files.
"""

from typing import Any

__all__ = ["from_torch", "to_torch"]


def __getattr__(name: str) -> Any:
    """Loads JAX only when something is converted: `--help` answers at once."""
    if name in __all__:
        from convert import names

        return getattr(names, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
