"""Resampling of the position embedding, equal to PyTorch's bicubic interpolation.

    stored [M, M, D] --rows W_h [H, M]--> [H, M, D] --columns W_w [W, M]--> [H, W, D]

DINOv2 calls `torch.nn.functional.interpolate(mode="bicubic")` in three conventions
(plain: offset 0.1; registers: antialias; SINDER: antialias and offset 0.1). Bicubic
interpolation is separable and linear, so each axis is one small matrix of weights,
computed here in float64. `jax.image.resize` agrees in the register convention only.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def cubic(x: Float[np.ndarray, "*shape"], a: float) -> Float[np.ndarray, "*shape"]:
    """The cubic convolution kernel of Keys (1981), zero outside -2 < x < 2.

    Args:
      x: distances in source pixels, float64.
      a: slope at 1; PyTorch uses -0.5 with antialiasing and -0.75 without.
    """
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_weights(
    stored: int, size: int, *, antialias: bool, offset: float
) -> Float[np.ndarray, "size stored"]:
    """Weights of one axis: output row j is `weights[j] @ stored rows`.

    Output j sits at `(j + ½)·stored/(size + offset) − ½` in source pixels. Without
    antialiasing, each output reads the four nearest source pixels, and the edge pixel
    repeats outside the image (aten upsample_bicubic2d). With antialiasing, the kernel
    widens when shrinking, taps outside the image are dropped and the remaining weights
    are normalized; an axis of unchanged length is copied whatever the offset (aten
    _upsample_bicubic2d_aa on the CPU; its GPU kernel was not checked).

    Args:
      stored: number of stored patches along the axis.
      size: number of output patches.
      antialias: PyTorch's `antialias=True`.
      offset: DINOv2's `interpolate_offset`, added to `size` in the scale only.

    Returns:
      float64 weights whose rows sum to 1.
    """
    scale = stored / (size + offset)
    centers = (np.arange(size) + 0.5) * scale - 0.5
    if antialias:
        if stored == size:
            return np.eye(size)
        distances = np.arange(stored)[None, :] - centers[:, None]
        weights = cubic(distances / max(scale, 1.0), a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    weights = np.zeros((size, stored))
    first = np.floor(centers).astype(int) - 1
    for tap in range(4):
        sources = first + tap
        value = cubic(sources - centers, a=-0.75)
        np.add.at(weights, (np.arange(size), np.clip(sources, 0, stored - 1)), value)
    return weights


def resample(
    grid: Float[Array, "M M D"],
    height: int,
    width: int,
    *,
    antialias: bool,
    offset: float,
) -> Float[Array, "{height} {width} D"]:
    """Resamples the stored position embedding of the patches to `height` x `width`.

    Follows DINOv2's `interpolate_pos_encoding`: returns a grid of the stored size as it
    is and otherwise resamples both axes.

    Args:
      grid: stored embedding of M x M patches.
      height: output rows, in patches.
      width: output columns, in patches.
      antialias: as for `resize_weights`.
      offset: likewise.
    """
    stored = grid.shape[0]
    if (height, width) == (stored, stored):
        return grid
    rows, columns = (
        jnp.asarray(
            resize_weights(stored, size, antialias=antialias, offset=offset),
            dtype=grid.dtype,
        )
        for size in (height, width)
    )
    return jnp.einsum(
        "hm,wn,mnd->hwd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST
    )
