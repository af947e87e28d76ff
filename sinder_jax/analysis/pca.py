"""Principal components of patch tokens as colors (appendix A of the paper).

tokens [H, W, D] --pca_basis--> mean, three components, range --pca_rgb--> picture
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

AnyArray = Array | np.ndarray

# A component whose range is below this share of the widest range is rounding noise of
# float32 (eps 1.2e-7 times the sums of a few hundred channels), not a feature.
_NOISE = 1e-5


class PCABasis(NamedTuple):
    """Three principal components of tokens, and the ranges that become colors.

    Attributes:
      mean: subtracted from every token first.
      components: orthonormal rows, largest variance first.
      low: coordinates that become 0, for red, green and blue.
      high: coordinates that become 255.
    """

    mean: Float[Array, " D"]
    components: Float[Array, "3 D"]
    low: Float[Array, " 3"]
    high: Float[Array, " 3"]


def pca_basis(tokens: Float[AnyArray, "*grid D"]) -> PCABasis:
    """Finds the three leading principal components of tokens (appendix A).

    A principal component has no sign. Here the token farthest out along a component has
    a positive coordinate, so that it is bright: defective tokens, if there are any.

    Args:
      tokens: at least three, with at least three channels; from one image, or from
        several images whose colors are to be compared.

    Raises:
      ValueError: fewer than three tokens or channels.

    Example:
      >>> import jax.numpy as jnp
      >>> square = jnp.array([[2.0, 1.0, 0.0], [2.0, -1.0, 0.0], [-2.0, 1.0, 0.0],
      ...                     [-2.0, -1.0, 0.0], [3.0, 0.0, 0.0], [-3.0, 0.0, 0.0]])
      >>> jnp.abs(pca_basis(square).components[:2]).round(3)
      Array([[1., 0., 0.],
             [0., 1., 0.]], dtype=float32)
    """
    tokens = jnp.asarray(tokens)
    rows = tokens.reshape(-1, tokens.shape[-1])
    if min(rows.shape) < 3:
        raise ValueError(
            f"three principal components need at least 3 tokens of 3 channels, got "
            f"{rows.shape[0]} of {rows.shape[1]}"
        )
    mean = jnp.mean(rows, axis=0)
    centered = rows - mean[None, :]
    components = jnp.linalg.svd(centered, full_matrices=False)[2][:3]
    coordinates = _coordinates(centered, components)
    farthest = jnp.argmax(jnp.abs(coordinates), axis=0)
    sign = jnp.where(coordinates[farthest, jnp.arange(3)] < 0, -1.0, 1.0)
    coordinates = coordinates * sign[None, :]
    return PCABasis(
        mean=mean,
        components=components * sign[:, None],
        low=jnp.min(coordinates, axis=0),
        high=jnp.max(coordinates, axis=0),
    )


def pca_rgb(
    tokens: Float[AnyArray, "*grid D"], basis: PCABasis | None = None
) -> UInt8[Array, "*grid 3"]:
    """Shows tokens as colors: three principal components, each scaled to 0-255.

    Args:
      tokens: [H, W, D] for a picture.
      basis: of other tokens, from `pca_basis`: the same color then means the same
        token in both pictures, and coordinates outside its range are clipped. None:
        the basis of these tokens, as in appendix A of the paper.

    Returns:
      Red, green and blue from 0 to 255. A component whose range is rounding noise
      (fewer than three components, or all tokens equal) is 0.

    Example:
      >>> import jax
      >>> tokens = jax.random.normal(jax.random.key(0), (4, 5, 8))
      >>> picture = pca_rgb(tokens)
      >>> picture.shape, picture.dtype, int(picture.min()), int(picture.max())
      ((4, 5, 3), dtype('uint8'), 0, 255)
    """
    tokens = jnp.asarray(tokens)
    basis = pca_basis(tokens) if basis is None else basis
    rows = tokens.reshape(-1, tokens.shape[-1]) - basis.mean[None, :]
    span = basis.high - basis.low
    is_noise = span <= _NOISE * jnp.max(span)
    scale = jnp.where(is_noise, 0.0, 255.0 / jnp.where(is_noise, 1.0, span))
    colors = _coordinates(rows, basis.components) - basis.low[None, :]
    colors = colors * scale[None, :]
    colors = jnp.clip(jnp.rint(colors), 0, 255).astype(jnp.uint8)
    return colors.reshape(*tokens.shape[:-1], 3)


def _coordinates(
    rows: Float[Array, "N D"], components: Float[Array, "3 D"]
) -> Float[Array, "N 3"]:
    return jnp.matmul(rows, components.T, precision=lax.Precision.HIGHEST)
