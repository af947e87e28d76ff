"""The tiny planted model and its truth, as checkpoints: shared by the tests."""

from pathlib import Path

import numpy as np

from sinder_jax import checkpoint, planted


def save(folder: Path) -> None:
    """Writes folder/planted, and folder/truth, where the planted unit does nothing."""
    made = planted.planted_model(0)
    checkpoint.save(folder / "planted", made.config, made.params)
    mlp = dict(made.params["blocks"]["mlp"])
    out = dict(mlp["w3"])
    out["kernel"] = np.array(out["kernel"])
    out["kernel"][made.block, made.unit] = 0.0
    blocks = {**made.params["blocks"], "mlp": {**mlp, "w3": out}}
    checkpoint.save(folder / "truth", made.config, {**made.params, "blocks": blocks})
