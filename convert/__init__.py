"""DINOv2 checkpoints between PyTorch and JAX, exactly, in both directions.

    state dict of NumPy arrays --from_torch--> (ViTConfig, params) --to_torch--> back
    any path --open_model--> sinder_jax.model.Model

`python -m convert` does the same for files.
"""

from typing import Any

__all__ = ["from_torch", "open_model", "to_torch"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when something is converted, so that `--help` is fast."""
    if name == "open_model":
        from convert import source

        return source.open_model
    if name in __all__:
        from convert import names

        return getattr(names, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
