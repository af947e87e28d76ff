"""Test-time registers: what throws a token throws an added token instead.

    params, photographs --find--> the hidden FFN units that are large in outlier tokens
    images + an added token --forward--> features, without the added token

From "Vision Transformers Don't Need Trained Registers" (arXiv:2506.08010). A few hidden
units, its register neurons, make the tokens that get long. At inference the largest
activation of each goes to a token added at the end, and all other tokens get zero. The
model stays as it is; attention still finds its long token, outside of the image.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sinder_jax import vit
from sinder_jax.analysis import defective
from sinder_jax.analysis.tokens import AnyArray, patch_tokens, token_norms
from sinder_jax.loss import check_option
from sinder_jax.param_tree import Params

Images = Float[AnyArray, "B height width 3"]
SHARE = 0.5
"""Of the largest score: a unit below it is no register neuron.

Measured on a trained model planted in five ways, on two times four photographs: the
planted unit scores 15 to 21, the next one an eighth to a fifth of that; on four others,
once, more than a quarter.
"""


class Neurons(NamedTuple):
    """Hidden units that make tokens long, the most active first.

    Attributes:
      blocks: the block of each, from 0.
      units: its index among the F hidden units of that block.
      scores: mean size of its activation in outlier tokens.
    """

    blocks: Int[np.ndarray, " k"]
    units: Int[np.ndarray, " k"]
    scores: Float[np.ndarray, " k"]


NONE = Neurons(np.zeros(0, int), np.zeros(0, int), np.zeros(0))
"""Of a model without outliers; `forward` is then the model itself."""


# --- Which units ----------------------------------------------------------------------


def find(
    config: vit.ViTConfig,
    params: Params,
    photographs: Iterable[Float[AnyArray, "height width 3"]],
    *,
    count: int = 10,
) -> Neurons:
    """Finds the units whose activations are largest in outlier tokens.

    Outliers are the patch tokens that `defective.large_norms` marks in the last block.
    A unit's score is the mean size of its activation over all outliers of all
    photographs. Only blocks up to the one in which the outliers appear are looked at:
    the first after which at least half of them have large norms.

    The paper chooses block, norm and number of units by hand, for each model; here they
    follow from the photographs. It takes activations as they are. Those of SwiGLU have
    either sign, hence their size; GELU's differ from theirs by 0.17 at most.

    Args:
      config: the architecture.
      params: the params tree.
      photographs: normalized pixels; a few are enough. Held one at a time.
      count: the most units to find; fewer if the others score below `SHARE` of the
        largest score.

    Returns:
      `NONE` if no photograph has an outlier.

    Raises:
      ValueError: no photograph, one that is not whole patches, or `count` below 1.
      FloatingPointError: a token is not finite.

    Example:
      >>> import jax
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> image = jax.random.normal(jax.random.key(0), (224, 224, 3))
      >>> found = find(made.config, made.params, [image])
      >>> (found.blocks == made.block, found.units == made.unit)
      (array([ True]), array([ True]))
    """
    check_option("count", count, count >= 1, "at least 1")
    params = jax.device_put(params)
    total = np.zeros((config.depth, config.hidden_dim))
    large, images, outliers = np.zeros(config.depth, int), 0, 0
    for image in photographs:
        marked = _large_by_block(config, params, image)
        last = marked[-1]
        images, outliers = images + 1, outliers + int(last.sum())
        large += (marked & last).sum(axis=(1, 2))
        if last.any():
            total += np.asarray(_activity(config, params, image, last), np.float64)
    if not images:
        raise ValueError("register neurons are found on photographs: give at least one")
    if not outliers:
        return NONE
    appear = int(np.argmax(2 * large >= outliers))
    return _highest(total[: appear + 1] / outliers, count)


def _large_by_block(
    config: vit.ViTConfig, params: Params, image: AnyArray
) -> Bool[np.ndarray, "L H W"]:
    norms = token_norms(patch_tokens(config, params, image))
    if not np.isfinite(norms).all():
        raise FloatingPointError("the model returns tokens that are not finite")
    return np.asarray(defective.large_norms(norms))


@functools.partial(jax.jit, static_argnames="config")
def _activity(
    config: vit.ViTConfig,
    params: Params,
    image: Float[AnyArray, "height width 3"],
    marked: Bool[AnyArray, "H W"],
) -> Float[Array, "L F"]:
    """Sizes of all activations, summed over the marked tokens."""
    block, first = vit.Block(config), 1 + config.num_register_tokens

    def body(x: Array, weights: Params) -> tuple[Array, Array]:
        found: Any = block.apply({"params": weights}, x)
        y, trace = found
        activations: Any = block.apply(
            {"params": weights}, trace.hidden, method=lambda b, h: b.mlp.activate(h)
        )
        sizes = jnp.abs(activations[0, first:])
        return y, jnp.sum(sizes, axis=0, where=marked.reshape(-1, 1))

    x: Any = vit.ViT(config).apply({"params": params}, image[None], method="embed")
    return lax.scan(body, x, params["blocks"])[1]


def _highest(scores: Float[np.ndarray, "blocks F"], count: int) -> Neurons:
    order = np.argsort(-scores, axis=None, kind="stable")[:count]
    order = order[scores.ravel()[order] >= SHARE * scores.max()]
    blocks, units = np.unravel_index(order, scores.shape)
    return Neurons(blocks, units, scores[blocks, units])


# --- Inference ------------------------------------------------------------------------


def forward(
    config: vit.ViTConfig, params: Params, neurons: Neurons, images: Images
) -> vit.Features:
    """Features of the images, computed with the added token and returned without it.

    Args:
      config: the architecture.
      params: the params tree.
      neurons: from `find`; of `NONE` the result is the plain model's, bit for bit.
      images: as for `vit.ViT`.

    Raises:
      ValueError: neurons that the model does not have, or a side of the images that is
        not a multiple of the patch size.
    """
    if not neurons.units.size:
        return _plain(config, params, images)
    grid = vit.patch_grid(config, *images.shape[1:3])
    (tokens,) = intermediates(config, params, neurons, images, (config.depth - 1,))
    tokens = _norm(config, params, tokens)
    return vit.Features(*vit.split_tokens(config, tokens, *grid))


def intermediates(
    config: vit.ViTConfig,
    params: Params,
    neurons: Neurons,
    images: Images,
    blocks: tuple[int, ...],
) -> tuple[vit.Tokens, ...]:
    """Raw tokens after the given blocks, without the added token or the final norm.

    Args:
      config: the architecture.
      params: the params tree.
      neurons: as for `forward`.
      images: as for `vit.ViT`.
      blocks: from 0 to L-1, in any order.

    Raises:
      ValueError: as for `forward`, or a block that does not exist.
    """
    for block in (*blocks, *neurons.blocks.tolist()):
        config.check_block(block)
    if not neurons.units.size:
        return _plain(config, params, images, blocks)
    for unit in neurons.units.tolist():
        if not 0 <= unit < config.hidden_dim:
            last = config.hidden_dim - 1
            raise ValueError(f"there is no hidden unit {unit}: units are 0 to {last}")
    moved = np.zeros((config.depth, config.hidden_dim), bool)
    moved[neurons.blocks, neurons.units] = True
    return _moved(config, params, images, moved, blocks)


@functools.partial(jax.jit, static_argnames=("config", "blocks"))
def _plain(
    config: vit.ViTConfig, params: Params, images: Images, blocks: Any = None
) -> Any:
    model, variables = vit.ViT(config), {"params": params}
    if blocks is None:
        return model.apply(variables, images)
    return model.apply(variables, images, blocks=blocks, method="intermediates")


@functools.partial(jax.jit, static_argnames="config")
def _norm(config: vit.ViTConfig, params: Params, tokens: vit.Tokens) -> vit.Tokens:
    model: Any = vit.ViT(config)
    return model.apply({"params": params}, tokens, method=lambda m, x: m.norm(x))


@functools.partial(jax.jit, static_argnames=("config", "blocks"))
def _moved(
    config: vit.ViTConfig,
    params: Params,
    images: Images,
    moved: Bool[AnyArray, "L F"],
    blocks: tuple[int, ...],
) -> tuple[vit.Tokens, ...]:
    """Runs the blocks with an added token at the end, zero before the first of them."""
    block, wanted = vit.Block(config), tuple(sorted(set(blocks)))
    # A block that is not kept writes to a slot past the end, which is dropped.
    slots = np.full(config.depth, len(wanted))
    slots[list(wanted)] = np.arange(len(wanted))

    def body(carry: tuple[Array, Array], of_block: Any) -> tuple[Any, None]:
        (x, kept), (weights, units, slot) = carry, of_block
        y: Any = block.apply({"params": weights}, x, units, method=_block)
        return (y, kept.at[slot].set(y[:, :-1], mode="drop")), None

    x: Any = vit.ViT(config).apply({"params": params}, images, method="embed")
    kept = jnp.zeros((len(wanted), *x.shape), x.dtype)
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
    of_blocks = (params["blocks"], jnp.asarray(moved), jnp.asarray(slots))
    (_, kept), _ = lax.scan(body, (x, kept), of_blocks)
    return tuple(kept[wanted.index(block)] for block in blocks)


def _block(
    block: vit.Block, x: Float[Array, "B added D"], units: Bool[Array, " F"]
) -> Float[Array, "B added D"]:
    """The stages of a block, with the activations of some units moved."""
    attended = block.attend(x, block.mix(block.project(x)))
    activations = block.mlp.activate(block.expand(attended))
    return block.add(attended, block.mlp.combine(to_added_token(activations, units)))


def to_added_token(
    activations: Float[Array, "B added F"], units: Bool[Array, " F"]
) -> Float[Array, "B added F"]:
    """Moves the largest activation of some units to the last token, zero elsewhere.

    The largest in size, with its sign, of all tokens but the last one.

    Args:
      activations: of the hidden units, of all tokens and the added one.
      units: True for the units to move.
    """
    own = activations[:, :-1]
    high, low = jnp.max(own, axis=1), jnp.min(own, axis=1)
    largest = jnp.where(high >= -low, high, low)
    moved = units[None, :]
    others = jnp.where(moved[:, None, :], 0.0, own)
    added = jnp.where(moved, largest, activations[:, -1])
    return jnp.concatenate([others, added[:, None, :]], axis=1)
