"""Bilinear resizing, one small matrix per axis.

    old and new length --bilinear_weights--> a matrix
    x [h, w, C] --resize: rows and columns by their matrix--> [height, width, C]

Source: PyTorch's `interpolate(mode="bilinear", align_corners=False)`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

HIGHEST = "highest"

Numbers = Array | np.ndarray  # of the host or of a device


def bilinear_weights(stored: int, size: int) -> Float[np.ndarray, "size stored"]:
    """Weights of one axis: output j is `weights[j] @ input`.

    PyTorch's `interpolate(mode="bilinear", align_corners=False)`, which never
    antialiases: output j sits at (j + ½)·stored/size − ½ between two inputs, and the
    edges repeat outside.

    Returns:
      float64 weights whose rows sum to 1.
    """
    centers = np.maximum((np.arange(size) + 0.5) * stored / size - 0.5, 0)
    first = np.minimum(centers.astype(int), stored - 1)
    second = np.minimum(first + 1, stored - 1)
    share = centers - first
    weights = np.zeros((size, stored))
    rows = np.arange(size)
    np.add.at(weights, (rows, first), 1 - share)
    np.add.at(weights, (rows, second), share)
    return weights


def weighted(
    rows: Float[Array, "height h"],
    columns: Float[Array, "width w"],
    x: Float[Array, "h w C"],
) -> Float[Array, "height width C"]:
    """An image resized by the weights of its rows and of its columns."""
    across = jnp.einsum("xw,hwc->hxc", columns, x, precision=HIGHEST)
    return jnp.einsum("yh,hxc->yxc", rows, across, precision=HIGHEST)


def resize(
    x: Num[Numbers, "h w C"], size: tuple[int, int]
) -> Float[Array, "height width C"]:
    """Bilinear resize to `size`, see `bilinear_weights`; integers become float32."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    rows, columns = (
        jnp.asarray(bilinear_weights(old, new), x.dtype)
        for old, new in zip(x.shape[:2], size, strict=True)
    )
    return weighted(rows, columns, x)
