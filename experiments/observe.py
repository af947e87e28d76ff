"""What a model makes of one photograph: tokens of its last block, defects, pictures.

params, image --last_patches--> tokens [H, W, D] --token_maps--> pictures.TokenMaps
tokens before and after --measure--> numbers of a summary
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from sinder_jax import loss, pictures, vit
from sinder_jax.analysis import pca
from sinder_jax.analysis.tokens import cosine, norm_ratio, token_norms

# Side of the neighbor window. As in the repair, patches nearer to the border than half
# of it are never outliers.
WINDOW = 3
LARGE_NORM = 3.0  # times the median: a token this large is called defective


@functools.partial(jax.jit, static_argnums=0)
def last_patches(
    config: vit.ViTConfig, params: Any, image: Float[Array, "height width 3"]
) -> Float[Array, "H W D"]:
    """Patch tokens after the last block, before the final norm.

    Args:
      config: the architecture.
      params: the params tree.
      image: normalized pixels.
    """
    blocks = (config.depth - 1,)
    tokens: Any = vit.ViT(config).apply(
        {"params": params}, image[None], blocks=blocks, method="intermediates"
    )
    grid = vit.patch_grid(config, *image.shape[:2])
    return vit.split_tokens(config, tokens[0], *grid)[2][0]


def outliers(
    tokens: Float[Array, "H W D"], direction: Float[Array, " D"], *, mask_thr: float
) -> Bool[Array, "H W"]:
    """Outliers of one image along a direction, see `loss.outlier_mask`."""
    logits = loss.outlier_logits(tokens, direction)
    return loss.outlier_mask(logits, mask_thr=mask_thr, window=WINDOW)


def token_maps(
    tokens: Float[Array, "H W D"], direction: Float[Array, " D"], *, mask_thr: float
) -> pictures.TokenMaps:
    """What `pictures` draws of one image's patch tokens.

    Args:
      tokens: of any block, before the final norm.
      direction: the singular defect direction of that block.
      mask_thr: see `loss.outlier_mask`.

    Raises:
      FloatingPointError: a token is not finite.
    """
    norms = token_norms(tokens)
    if not np.isfinite(norms).all():
        raise FloatingPointError("the model gives tokens that are not finite")
    mask = outliers(tokens, direction, mask_thr=mask_thr)
    return pictures.TokenMaps(*jax.device_get((pca.pca_rgb(tokens), norms, mask)))


def measure(
    before: Float[Array, "H W D"],
    after: Float[Array, "H W D"],
    direction: Float[Array, " D"],
    *,
    mask_thr: float,
) -> dict[str, float]:
    """Defects of one photograph before and after a repair, and what became of the rest.

    Args:
      before: last block's tokens of the original model.
      after: those of the repaired model.
      direction: of the last block of the original model, for both.
      mask_thr: see `loss.outlier_mask`.

    Returns:
      For "before" and "after": patches that are outliers along the direction, patches
      whose norm is over 3 x the median, the largest norm over the median. And the mean
      cosine, before to after, of the tokens that were defective by neither measure.
    """
    numbers: dict[str, float] = {}
    sound = None
    for name, tokens in (("before", before), ("after", after)):
        mask = np.asarray(outliers(tokens, direction, mask_thr=mask_thr))
        norms = np.asarray(token_norms(tokens))
        large = norms > LARGE_NORM * np.median(norms)
        numbers[f"outliers_{name}"] = int(mask.sum())
        numbers[f"large_norms_{name}"] = int(large.sum())
        numbers[f"norm_ratio_{name}"] = float(norm_ratio(norms))
        sound = ~(mask | large) if sound is None else sound
    cosines = np.asarray(cosine(before, after))
    return numbers | {"cosine_of_sound_tokens": float(cosines[sound].mean())}
