"""How bad the patch tokens of a photograph look, and what a remedy changed in them.

    norms [H, W] --tail--> how heavy their tail is
    tokens [H, W, D] --pca_variation--> total variation of their PCA map
    pixels --photograph_variation--> that of the photograph, on the same grid
    tokens now, of the model before, of the truth --sums--> what a photograph adds

`defective` says which tokens are defective; nothing here defines that anew.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sinder_jax.analysis import defective, pca
from sinder_jax.analysis.tokens import AnyArray, cosine, token_norms

TAIL = 0.05  # of the patches, the longest, are the tail


def tail_size(patches: int) -> int:
    """Returns k, how many of the longest tokens of a photograph `tail` looks at."""
    return max(1, math.ceil(TAIL * patches))


def tail(norms: Float[AnyArray, "H W"]) -> Float[Array, ""]:
    """Returns Hill's estimate of 1/α from the k = `tail_size` largest norms.

    The mean of log(n_i / n_{k+1}) over the k largest norms n_1, …, n_k. Where norms
    have a tail like n^-α it estimates 1/α: 0 without a tail, larger for heavier ones.

    Args:
      norms: of one photograph's patch tokens, above 0; at least two.

    Source: Hill, A Simple General Approach to Inference About the Tail of a
    Distribution, Annals of Statistics 1975.

    Example:
      >>> import jax.numpy as jnp
      >>> norms = jnp.ones((4, 5)).at[1, 2].set(jnp.e)
      >>> tail_size(20), tail(norms).round(4)
      (1, Array(1., dtype=float32))
    """
    ordered = jnp.sort(jnp.log(jnp.asarray(norms).ravel()))[::-1]
    k = tail_size(ordered.size)
    return jnp.mean(ordered[:k]) - ordered[k]


def variation(image: Float[AnyArray, "H W C"]) -> Float[Array, ""]:
    """Returns the total variation: absolute differences of neighbors, summed.

    Neighbors to the right and below, all channels.

    Example:
      >>> import jax.numpy as jnp
      >>> float(variation(jnp.zeros((3, 3, 1)).at[1, 1].set(1.0)))
      4.0
    """
    image = jnp.asarray(image)
    down, right = jnp.diff(image, axis=0), jnp.diff(image, axis=1)
    return jnp.sum(jnp.abs(down)) + jnp.sum(jnp.abs(right))


def pca_variation(tokens: Float[AnyArray, "H W D"]) -> Float[Array, ""]:
    """Returns the total variation of the three components that `pca.pca_rgb` shows.

    They are fitted to this photograph, and each has range 0 to 1.

    Raises:
      ValueError: as `pca.pca_basis`.
    """
    return variation(pca.pca_rgb(tokens).astype(jnp.float32) / 255)


def photograph_variation(
    pixels: UInt8[np.ndarray, "height width 3"], patch_size: int
) -> float:
    """Returns the total variation of the mean colors of the patches.

    Each color has range 0 to 1 over the photograph, as the components of the tokens
    have; one that is the same everywhere varies by 0.

    Args:
      pixels: both sides whole patches.
      patch_size: pixels.
    """
    height, width = (side // patch_size for side in pixels.shape[:2])
    patches = pixels.reshape(height, patch_size, width, patch_size, 3)
    colors = patches.astype(np.float64).mean(axis=(1, 3))
    low, high = colors.min(axis=(0, 1)), colors.max(axis=(0, 1))
    span = np.where(high > low, high - low, 1.0)
    return float(variation((colors - low) / span))


class Sums(NamedTuple):
    """What one photograph adds to the sums that all measures are made of.

    A token is sound if the model before shows it neither with a large norm nor as an
    outlier along the direction, as in `defective.measure`; it is thrown if the model
    before gives it a large norm. Tokens that are only outliers are neither.

    Attributes:
      patches: how many there are.
      large: with a large norm now.
      along: outliers along the direction now.
      large_before, along_before: of the model before.
      norm_ratio: largest over median norm.
      tail: from `tail`.
      pca_variation: from `pca_variation`.
      sound, thrown: numbers of these tokens.
      kept: cosines with the model before, summed over the sound tokens.
      true_sound, true_thrown: cosines with the truth, summed; 0 without a truth.
    """

    patches: Float[Array, ""]
    large: Float[Array, ""]
    along: Float[Array, ""]
    large_before: Float[Array, ""]
    along_before: Float[Array, ""]
    norm_ratio: Float[Array, ""]
    tail: Float[Array, ""]
    pca_variation: Float[Array, ""]
    sound: Float[Array, ""]
    thrown: Float[Array, ""]
    kept: Float[Array, ""]
    true_sound: Float[Array, ""]
    true_thrown: Float[Array, ""]


@functools.partial(jax.jit, static_argnames="mask_thr")
def sums(
    tokens: Float[AnyArray, "H W D"],
    before: Float[AnyArray, "H W D"],
    direction: Float[AnyArray, " D"],
    truth: Float[AnyArray, "H W D"] | None = None,
    *,
    mask_thr: float = 4.0,
) -> Sums:
    """Measures one photograph's patch tokens of the last block.

    Args:
      tokens: of the model to measure.
      before: of the model before any remedy.
      direction: ν of the last block of the model before, for both.
      truth: of the model before the defect was planted; None if there is none.
      mask_thr: see `defective.detect`.

    Raises:
      ValueError: `mask_thr` out of range, or fewer than three tokens.
    """

    def marked(some: Float[AnyArray, "H W D"]) -> tuple[Array, Array]:
        mask = defective.detect(some, direction, mask_thr=mask_thr).mask
        return defective.large_norms(token_norms(some)), mask

    (large, along), (thrown, odd) = marked(tokens), marked(before)
    sound, norms = ~(thrown | odd), token_norms(tokens)
    cosines = jnp.zeros(sound.shape) if truth is None else cosine(tokens, truth)
    found = Sums(
        patches=jnp.asarray(sound.size),
        large=large.sum(),
        along=along.sum(),
        large_before=thrown.sum(),
        along_before=odd.sum(),
        norm_ratio=defective.norm_ratio(norms),
        tail=tail(norms),
        pca_variation=pca_variation(tokens),
        sound=sound.sum(),
        thrown=thrown.sum(),
        kept=jnp.sum(cosine(tokens, before), where=sound),
        true_sound=jnp.sum(cosines, where=sound),
        true_thrown=jnp.sum(cosines, where=thrown),
    )
    return Sums(*(jnp.asarray(value, jnp.float32) for value in found))
