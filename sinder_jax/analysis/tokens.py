"""Patch tokens and directions: angles, learning targets, and where a token grew.

    image --patch_tokens, last_patches--> tokens [H, W, D] after chosen blocks
    tokens [B, H, W, D] --empirical_direction--> direction, its spread over images
    tokens + direction --angles--> degrees --separation--> how well they tell defects
    tokens + direction --learning_targets--> equation (7)
    images + direction --growth--> what attention and FFN of each block add along it

`defective` says which tokens are defective. Every function but `separation` can be
jitted. None multiplies matrices at an accelerator's default precision.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from sinder_jax import loss, vit
from sinder_jax.loss import normalize
from sinder_jax.param_tree import Params

AnyArray = Array | np.ndarray


@functools.partial(jax.jit, static_argnames=("config", "blocks"))
def patch_tokens(
    config: vit.ViTConfig,
    params: Params,
    image: Float[AnyArray, "height width 3"],
    blocks: tuple[int, ...] | None = None,
) -> Float[Array, "k H W D"]:
    """Returns the patch tokens of one image after some blocks, before the final norm.

    Args:
      config: the architecture; static under `jax.jit`.
      params: the params tree.
      image: normalized pixels.
      blocks: counted from 0; None: all.

    Raises:
      ValueError: a side of the image is not a multiple of the patch size.

    Example:
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> image = jax.random.normal(jax.random.key(0), (56, 84, 3))
      >>> patch_tokens(made.config, made.params, image, (0, 11)).shape
      (2, 4, 6, 128)
    """
    blocks = tuple(range(config.depth)) if blocks is None else blocks
    tokens: Any = vit.ViT(config).apply(
        {"params": params}, image[None], blocks=blocks, method="intermediates"
    )
    grid = vit.patch_grid(config, *image.shape[:2])
    return jnp.concatenate([vit.split_tokens(config, x, *grid)[2] for x in tokens])


def last_patches(
    config: vit.ViTConfig, params: Params, image: Float[AnyArray, "height width 3"]
) -> Float[Array, "H W D"]:
    """Returns the patch tokens after the last block, see `patch_tokens`."""
    return patch_tokens(config, params, image, (config.depth - 1,))[0]


def token_norms(tokens: Float[AnyArray, "*grid D"]) -> Float[Array, "*grid"]:
    """Returns the Euclidean norm of every token.

    Example:
      >>> import jax.numpy as jnp
      >>> token_norms(jnp.array([[3.0, 4.0], [0.0, 2.0]]))
      Array([5., 2.], dtype=float32)
    """
    return jnp.linalg.norm(jnp.asarray(tokens), axis=-1)


def cosine(
    a: Float[AnyArray, "*grid D"], b: Float[AnyArray, "*grid D"]
) -> Float[Array, "*grid"]:
    """Returns the cosine between each token of `a` and the one at its place in `b`.

    From -1 to 1; 0 where either has norm zero.

    Example:
      >>> import jax.numpy as jnp
      >>> before = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> cosine(before, jnp.array([[3.0, 0.0], [0.0, -2.0]]))
      Array([1., 0.], dtype=float32)
    """
    product = jnp.sum(normalize(jnp.asarray(a)) * normalize(jnp.asarray(b)), axis=-1)
    return jnp.clip(product, -1.0, 1.0)


def angles(
    tokens: Float[AnyArray, "*grid D"], direction: Float[AnyArray, " D"]
) -> Float[Array, "*grid"]:
    """Returns the angle between every token and a line, in degrees from 0 to 90.

    The line has no sign, like a singular direction (figures 2, 6 and 8 of the paper).
    The angle is 90 if the token or the direction is zero.

    The angle is computed from its tangent: an arc cosine in float32 has no values
    between 0 and 0.02 degrees.

    Args:
      tokens: any number of tokens.
      direction: of any length.

    Example:
      >>> import jax.numpy as jnp
      >>> tokens = jnp.array([[2.0, 0.0], [-1.0, 1.0], [0.0, 5.0], [0.0, 0.0]])
      >>> angles(tokens, jnp.array([1.0, 0.0])).round(2)
      Array([ 0., 45., 90., 90.], dtype=float32)
    """
    tokens = normalize(jnp.asarray(tokens))
    unit = jnp.broadcast_to(normalize(jnp.asarray(direction)), tokens.shape)
    along = jnp.sum(tokens * unit, axis=-1)
    across = jnp.linalg.norm(tokens - along[..., None] * unit, axis=-1)
    degrees = jnp.rad2deg(jnp.arctan2(across, jnp.abs(along)))
    return jnp.where(along == 0, 90.0, jnp.minimum(degrees, 90.0))


# --- The empirical direction and its controls -----------------------------------------


class Empirical(NamedTuple):
    """The direction of the highest-norm tokens, and how well the images agree on it.

    Attributes:
      direction: unit vector; its sign is that of most of its tokens.
      spread: root mean square of the angles between the images' directions and
        `direction`; degrees.
      per_image: unit rows, one for each image.
      pairwise: angles between the images' directions; degrees.
    """

    direction: Float[Array, " D"]
    spread: Float[Array, ""]
    per_image: Float[Array, "B D"]
    pairwise: Float[Array, "B B"]


@functools.partial(jax.jit, static_argnames="count")
def empirical_direction(
    tokens: Float[AnyArray, "B H W D"], *, count: int = 3
) -> Empirical:
    """Returns the mean direction of the highest-norm tokens (figure 2).

    The mean of lines is the leading singular vector of their unit vectors: the line
    with the least sum of squared sines to them, whatever their signs.

    Args:
      tokens: patch tokens of one block, of one or more images.
      count: number of highest-norm tokens taken from each image; 1 to H·W.

    Raises:
      ValueError: `count` out of range.

    Example:
      >>> import jax
      >>> tokens = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
      >>> tokens = tokens.at[:, 1, 2, 5].set(100.0).at[:, 2, 2, 5].set(-90.0)
      >>> found = empirical_direction(tokens, count=2)
      >>> int(abs(found.direction).argmax()), bool(found.spread < 2)
      (5, True)
    """
    tokens = jnp.asarray(tokens)
    images, rows, columns, width = tokens.shape
    if not 1 <= count <= rows * columns:
        raise ValueError(
            f"count must be 1 to {rows * columns} tokens of an image, got {count}"
        )
    tokens = tokens.reshape(images, rows * columns, width)
    _, highest = lax.top_k(jnp.linalg.norm(tokens, axis=-1), count)
    units = normalize(jnp.take_along_axis(tokens, highest[:, :, None], axis=1))
    per_image = jax.vmap(_mean_line)(units)
    direction = _mean_line(units.reshape(images * count, width))
    degrees = angles(per_image, direction)
    spread = jnp.sqrt(jnp.mean(jnp.square(degrees)))
    pairwise = jax.vmap(lambda line: angles(per_image, line))(per_image)
    return Empirical(direction, spread, per_image, pairwise)


def _mean_line(units: Float[Array, "N D"]) -> Float[Array, " D"]:
    line = jnp.linalg.svd(units, full_matrices=False)[2][0]
    along = jnp.matmul(units, line, precision=lax.Precision.HIGHEST)
    return jnp.where(jnp.sum(along) < 0, -line, line)


def random_directions(key: Array, count: int, width: int) -> Float[Array, "count D"]:
    """Returns unit rows, uniform on the sphere: the control of figure 8.

    Example:
      >>> import jax
      >>> random_directions(jax.random.key(0), 200, 384).shape
      (200, 384)
    """
    return normalize(jax.random.normal(key, (count, width)))


def separation(
    values: Float[AnyArray, "*grid"], positives: Bool[AnyArray, "*grid"]
) -> float:
    """Returns the area under the ROC curve, from 0 to 1.

    It is the probability that a random positive has a larger value than a random
    negative, where a tie counts one half: 1 if a threshold separates them, 0.5 by
    chance. Defects have small angles: pass the negative of the angles.

    Args:
      values: any score, for instance minus the angles to ν_i.
      positives: the defective tokens by another criterion, such as their norms.

    Returns:
      NaN if all or none of the tokens are positive.

    Example:
      >>> import numpy as np
      >>> degrees = np.array([10.0, 80.0, 85.0, 80.0])
      >>> separation(-degrees, np.array([True, False, False, False]))
      1.0
    """
    import scipy.stats  # takes a second, which a repair need not wait for

    ranks = scipy.stats.rankdata(np.asarray(values, np.float64))
    positives = np.ravel(np.asarray(positives))
    count = int(positives.sum())
    others = positives.size - count
    if not count or not others:
        return float("nan")
    above = ranks.ravel()[positives].sum() - count * (count + 1) / 2
    return float(above / (count * others))


# --- Learning targets -----------------------------------------------------------------


def learning_targets(
    tokens: Float[AnyArray, "H W D"],
    direction: Float[AnyArray, " D"],
    temperatures: Sequence[float] = (0.01, 0.1, 1.0),
    *,
    window: int = 3,
) -> Float[Array, "n H W D"]:
    """Returns equation (7) for every patch and several temperatures (figure 6).

    Near the border the window is cut off, and its weights still add up to 1. In the
    repair only outliers have a target, and outliers are never on the border.

    Args:
      tokens: patch tokens of one image after a block.
      direction: the singular defect direction of that block.
      temperatures: τ, each above 0; plain numbers, also under `jax.jit`.
      window: 3 or 5.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> import jax
      >>> tokens = jax.random.normal(jax.random.key(0), (6, 5, 16))
      >>> learning_targets(tokens, tokens[2, 2], (0.1, 1.0)).shape
      (2, 6, 5, 16)
    """
    for temperature in temperatures:
        loss.check_loss_options(window=window, temperature=temperature)
    return _targets(tokens, direction, tuple(temperatures), window)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _targets(
    tokens: Float[AnyArray, "H W D"],
    direction: Float[AnyArray, " D"],
    temperatures: tuple[float, ...],
    window: int,
) -> Float[Array, "n H W D"]:
    tokens = jnp.asarray(tokens)
    logits = loss.outlier_logits(tokens, jnp.asarray(direction))
    targets = [
        loss.neighbor_target(tokens, logits, window=window, temperature=temperature)
        for temperature in temperatures
    ]
    return jnp.stack(targets)


# --- Where a token grew ---------------------------------------------------------------


class Growth(NamedTuple):
    """Contributions to every patch token's length along a direction.

    start + sum over blocks of (attention + ffn) is end, up to rounding. Select tokens
    by a mask: `growth.ffn[:, mask]` is [L, tokens].

    Attributes:
      start: the token's length along the direction before block 0.
      attention: added by γ1·Attn(LN1 x) of each block.
      ffn: added by γ2·FFN(LN2 x) of each block.
      end: the token's length along the direction after the last block.
    """

    start: Float[Array, "B H W"]
    attention: Float[Array, "L B H W"]
    ffn: Float[Array, "L B H W"]
    end: Float[Array, "B H W"]


@functools.partial(jax.jit, static_argnums=0)
def growth(
    config: vit.ViTConfig,
    params: Params,
    images: Float[AnyArray, "B height width 3"],
    direction: Float[AnyArray, " D"],
) -> Growth:
    """Measures what the attention and the FFN of each block add to tokens along a line.

    Args:
      config: the architecture; static under `jax.jit`.
      params: the params tree.
      images: normalized pixels.
      direction: for all blocks, for instance ν of the last block; of any length. Its
        sign is chosen so that the longest token along it ends up positive.

    Raises:
      ValueError: a side of the images is not a multiple of the patch size.

    Example:
      >>> import jax
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> image = jax.random.normal(jax.random.key(0), (1, 56, 56, 3))
      >>> parts = growth(made.config, made.params, image, made.direction)
      >>> parts.ffn.shape
      (12, 1, 4, 4)
    """
    rows, columns = vit.patch_grid(config, *images.shape[1:3])
    unit = normalize(jnp.asarray(direction))
    block = vit.Block(config)

    def along(x: Float[Array, "B T D"]) -> Float[Array, "B H W"]:
        length = jnp.einsum("btd,d->bt", x, unit, precision=lax.Precision.HIGHEST)
        parts = vit.split_tokens(config, length[:, :, None], rows, columns)
        return parts[2][:, :, :, 0]

    def body(x: Array, weights: Params) -> tuple[Array, tuple[Array, Array]]:
        found: Any = block.apply({"params": weights}, x)
        y, trace = found
        return y, (along(trace.attended - x), along(y - trace.attended))

    x: Any = vit.ViT(config).apply({"params": params}, images, method="embed")
    end, (attention, ffn) = lax.scan(body, x, params["blocks"])
    lengths = along(end)
    longest = jnp.argmax(jnp.abs(lengths))
    sign = jnp.where(lengths.ravel()[longest] < 0, -1.0, 1.0)
    return Growth(sign * along(x), sign * attention, sign * ffn, sign * lengths)
