"""What counts as a defective token, and how defective a photograph's tokens are.

    tokens [H, W, D], direction --detect--> outliers along the direction (equation 5)
    norms [H, W] --large_norms, norm_ratio--> tokens that are too long
    tokens, direction --token_maps--> TokenMaps, which `plots.pictures` draws
    tokens before and after a repair --measure--> numbers of a summary

There are two signs: a token lies along the singular defect direction of its block, or
its norm is more than LARGE_NORM times the median. `is_defective` wants both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from sinder_jax import loss
from sinder_jax.analysis import pca
from sinder_jax.analysis.tokens import AnyArray, cosine, token_norms

LARGE_NORM = 3.0  # times the median norm of the image's patch tokens
ALONG = 45.0  # degrees; closer, more than half of a token's square is along the line


# --- Along a direction ----------------------------------------------------------------


class Detection(NamedTuple):
    """Outliers of one image along a direction (equation 5).

    Attributes:
      logits: -|cos(token, direction)|, from -1 (defective) to 0.
      mask: True where a token is an outlier; never on the border.
    """

    logits: Float[Array, "H W"]
    mask: Bool[Array, "H W"]


def detect(
    tokens: Float[AnyArray, "H W D"],
    direction: Float[AnyArray, " D"],
    *,
    mask_thr: float = 4.0,
    window: int = 3,
) -> Detection:
    """Finds the outliers that the repair would find (figure 6, third row).

    Args:
      tokens: patch tokens of one image after a block.
      direction: the singular defect direction of that block.
      mask_thr: μ, in standard deviations below the mean logit; above 0.
      window: 3 or 5; patches closer than window//2 to the border are never outliers.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> import jax
      >>> tokens = jax.random.normal(jax.random.key(0), (8, 8, 256))
      >>> found = detect(tokens.at[3, 4, 0].set(200.0), jax.numpy.eye(256)[0])
      >>> int(found.mask.sum()), bool(found.mask[3, 4]), found.logits[3, 4].round(2)
      (1, True, Array(-1., dtype=float32))
    """
    loss.check_loss_options(mask_thr=mask_thr, window=window)
    logits = loss.outlier_logits(jnp.asarray(tokens), jnp.asarray(direction))
    mask = loss.outlier_mask(logits, mask_thr=mask_thr, window=window)
    return Detection(logits, mask)


# --- By norm --------------------------------------------------------------------------


def norm_ratio(norms: Float[AnyArray, "*images H W"]) -> Float[Array, "*images"]:
    """Returns the largest norm over the median norm of each image, at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> norm_ratio(jnp.array([[1.0, 2.0, 2.0], [2.0, 3.0, 50.0]]))
      Array(25., dtype=float32)
    """
    norms = jnp.asarray(norms)
    return jnp.max(norms, axis=(-2, -1)) / jnp.median(norms, axis=(-2, -1))


def large_norms(
    norms: Float[AnyArray, "*images H W"], factor: float = LARGE_NORM
) -> Bool[Array, "*images H W"]:
    """Marks the tokens whose norm is above `factor` times the median of their image.

    A second way to see defects, which needs no direction.

    Example:
      >>> import jax.numpy as jnp
      >>> int(large_norms(jnp.array([[1.0, 2.0, 2.0], [2.0, 7.0, 50.0]])).sum())
      2
    """
    norms = jnp.asarray(norms)
    return norms > factor * jnp.median(norms, axis=(-2, -1), keepdims=True)


def is_defective(
    norms: Float[AnyArray, "*images H W"],
    angles: Float[AnyArray, "*images H W"],
    detected: Bool[AnyArray, "*images H W"],
) -> Bool[Array, "*images H W"]:
    """Marks the tokens that lie along the singular defect direction and are large.

    A token lies along the direction if equation 5 detects it or its angle is below
    ALONG: where a quarter of the tokens are defective, none is an outlier. Direction
    alone is not enough: at 4 standard deviations, about two of 1,369 normally
    distributed cosines are outliers.

    Args:
      norms: of the tokens.
      angles: to the direction of their block, in degrees.
      detected: the mask of `detect`.
    """
    along = jnp.asarray(detected) | (jnp.asarray(angles) < ALONG)
    return along & large_norms(norms)


# --- One photograph -------------------------------------------------------------------


class TokenMaps(NamedTuple):
    """Maps of one image's patch tokens, ready to draw.

    Attributes:
      pca: principal components as colors, from `pca.pca_rgb`.
      norms: norm of every token.
      mask: True where a token is an outlier.
    """

    pca: UInt8[np.ndarray, "H W 3"]
    norms: Float[np.ndarray, "H W"]
    mask: Bool[np.ndarray, "H W"]


def token_maps(
    tokens: Float[Array, "H W D"], direction: Float[Array, " D"], *, mask_thr: float
) -> TokenMaps:
    """Computes the maps of one image's patch tokens, as NumPy arrays.

    Args:
      tokens: of any block, before the final norm.
      direction: the singular defect direction of that block.
      mask_thr: see `detect`.

    Raises:
      FloatingPointError: a token is not finite.
    """
    norms = token_norms(tokens)
    if not np.isfinite(norms).all():
        raise FloatingPointError("the model returns tokens that are not finite")
    mask = detect(tokens, direction, mask_thr=mask_thr).mask
    return TokenMaps(*jax.device_get((pca.pca_rgb(tokens), norms, mask)))


def describe(maps: TokenMaps) -> str:
    """Says in a few words how many outliers there are and how large the norms get."""
    count, ratio = int(maps.mask.sum()), float(norm_ratio(maps.norms))
    outliers = "1 outlier" if count == 1 else f"{count} outliers"
    return f"{outliers}, max norm {ratio:.1f} x median"


def measure(
    before: Float[Array, "H W D"],
    after: Float[Array, "H W D"],
    direction: Float[Array, " D"],
    *,
    mask_thr: float,
) -> dict[str, int | float]:
    """Counts the defects of one photograph before and after a repair.

    Args:
      before: last block's tokens of the original model.
      after: those of the repaired model.
      direction: of the last block of the original model, for both.
      mask_thr: see `detect`.

    Returns:
      For "before" and "after": the number of outliers along the direction, the number
      of large norms, and the norm ratio. And the mean cosine, before to after, of the
      tokens that were defective before by neither criterion.
    """
    numbers: dict[str, int | float] = {}
    flawed = []
    for name, tokens in (("before", before), ("after", after)):
        norms = token_norms(tokens)
        mask = detect(tokens, direction, mask_thr=mask_thr).mask
        large = large_norms(norms)
        numbers[f"outliers_{name}"] = int(mask.sum())
        numbers[f"large_norms_{name}"] = int(large.sum())
        numbers[f"norm_ratio_{name}"] = float(norm_ratio(norms))
        flawed.append(np.asarray(mask | large))
    cosines = np.asarray(cosine(before, after))
    return numbers | {"cosine_of_sound_tokens": float(cosines[~flawed[0]].mean())}
