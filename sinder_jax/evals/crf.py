"""The fully connected CRF of STEGO and CAUSE, by exact mean field.

    image --_arrange--> pixels in blocks of similar place and color
    blocks --_near--> the pairs of blocks whose pixels affect each other
    probabilities, pairs --mean_field--> probabilities that follow the image's edges

The model is that of Krähenbühl and Koltun (2011). The originals run pydensecrf
(mhamilton723/STEGO crf.py `dense_crf`), whose lattice approximates the sums over all
pairs of pixels; here they are exact to float32 rounding. The kernel has N² entries for
N pixels: it is computed block by block whenever it is needed, and never stored.
"""

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, UInt8
from numpy.typing import ArrayLike

LEAST_PROBABILITY = 1e-5  # of the unary term, as pydensecrf's `unary_from_softmax`
MOST_PROBABILITY = 1 + 1e-3  # a softmax in bfloat16 may exceed 1 by rounding
SIGMAS = (1e-3, 1e6)  # pixels or color levels; float32 holds their squares ...
WEIGHTS = (0.0, 1e6)  # ... and the logits that such weights make
ROUNDING = 2.0**-24  # of float32, relative
BLOCKS = {"cpu": 256}  # pixels; few enough that its boxes are small ...
LARGE_BLOCK = 2_048  # ... or so many that an accelerator is busy with a pair of blocks
HIGHEST = "highest"

# On the host; on the device in a jitted function. 32 bits, with or without x64.
Numbers = Array | np.ndarray
Number = Array | np.int32 | np.float32


class _Blocks(NamedTuple):
    """The pixels in blocks of similar features, and the pairs of blocks that count.

    Attributes:
      features: row, column, red, green and blue of each pixel; whole numbers, whose
        squared differences float32 adds without rounding, up to 2,896 pixels a side.
      order: which pixel of the image is at each place of the blocks; the last block is
        filled up by repeating one.
      place_of: the inverse, where each pixel of the image is in the blocks.
      first, second: numbers of the blocks of each pair, first <= second.
      num_pairs: their number; the rest of `first` and `second` is padding.
    """

    features: tuple[Float32[Numbers, "blocks size"], ...]
    order: Int32[Numbers, " places"]
    place_of: Int32[Numbers, " N"]
    first: Int32[Numbers, " pairs"]
    second: Int32[Numbers, " pairs"]
    num_pairs: Number


class _Settings(NamedTuple):
    """Numbers that the iterations use; another value compiles nothing again."""

    iterations: Number
    smoothness_weight: Number
    appearance_weight: Number
    place_scale: Number  # of squared distances
    color_scale: Number  # of squared differences of colors


def mean_field(
    probabilities: ArrayLike,
    image: ArrayLike,
    *,
    iterations: int = 10,
    smoothness_weight: float = 3.0,
    smoothness_sigma: float = 1.0,
    appearance_weight: float = 4.0,
    position_sigma: float = 67.0,
    color_sigma: float = 3.0,
    block: int | None = None,
) -> Float32[Array, "*n height width C"]:
    """Marginals of a fully connected CRF with Potts compatibility.

    With U = −log(clip(p, 1e-5, 1)) and Q = softmax(−U) at first, each iteration sets

        Q = softmax(−U + smoothness_weight·K₁Q + appearance_weight·K₂Q)

    K₁ is exp(−d²/2) for d the distance of two pixels over `smoothness_sigma`; in K₂, d²
    adds up the squared distance over `position_sigma` and the squared difference of
    colors over `color_sigma`. Both kernels include a pixel's effect on itself, and both
    are normalized to D^(−½)·K·D^(−½), where D holds the sums of their rows.

    K₁ is separable and applied as two small matrices. K₂ is symmetric: a pair of blocks
    is evaluated once an iteration, for both directions and for all label maps. A pair
    is skipped if the boxes around the features of the two blocks are so far apart that
    exp(−d²/2) <= 2⁻²⁴/N for all of their pixels. A row of K₂ has N entries, so what it
    loses adds up to 2⁻²⁴ at most; its sum is at least 1, the pixel itself. With D >= 1
    and Q <= 1, a message loses at most 2⁻²⁴ too. Both are float32's rounding of 1.

    An exponential counts as 15 operations for both directions of a pair, a message
    as 2·n·C for each direction: 6e13 FLOP for all pairs of 560 × 560 pixels, 27 classes
    and 10 iterations. Photographs leave 12 to 40% of the pairs, see `pairs_left`, an
    image of one color all. Memory grows with the pixels: some ten times the
    probabilities, and 8 bytes for each pair of blocks. All of it runs on JAX's default
    device; several images can go to several devices. Not for use inside `jax.jit`,
    since the image decides the pairs.

    Args:
      probabilities: [height, width, C], or [n, height, width, C] for several label maps
        of one image; floating point, 0 to 1. They need not sum to 1.
      image: RGB [height, width, 3], uint8, not normalized.
      iterations: of the mean field; 0 returns softmax(−U).
      smoothness_weight: of K₁, at least 0.
      smoothness_sigma: of K₁, pixels.
      appearance_weight: of K₂, at least 0.
      position_sigma: of K₂, pixels.
      color_sigma: of K₂, levels of 0 to 255.
      block: pixels of a block; None: 256 on a CPU, 2,048 elsewhere. Changes the speed,
        and the result by rounding only.

    Returns:
      Marginals in the shape of `probabilities`; they sum to 1 over the classes.

    Raises:
      ValueError: shapes that do not go together or have no element, an image that is
        not uint8, a probability that is not finite or not from 0 to 1, an option out of
        range.
    """
    given, pixels = np.asarray(probabilities), np.asarray(image)
    _check_arrays(given, pixels)
    iterations = operator.index(iterations)
    block = _default_block() if block is None else operator.index(block)
    _check_options(
        smoothness_weight=(smoothness_weight, *WEIGHTS),
        appearance_weight=(appearance_weight, *WEIGHTS),
        smoothness_sigma=(smoothness_sigma, *SIGMAS),
        position_sigma=(position_sigma, *SIGMAS),
        color_sigma=(color_sigma, *SIGMAS),
        iterations=(iterations, 0, math.inf),
        block=(block, 1, math.inf),
    )
    place_scale, color_scale = (0.5 / s**2 for s in (position_sigma, color_sigma))
    height, width = pixels.shape[:2]
    out = _iterate(
        given.astype(np.float32).reshape(-1, *given.shape[-3:]),
        _arrange(pixels, place_scale, color_scale, block),
        (_smoothing(height, smoothness_sigma), _smoothing(width, smoothness_sigma)),
        _Settings(
            np.int32(iterations),
            np.float32(smoothness_weight),
            np.float32(appearance_weight),
            np.float32(place_scale),
            np.float32(color_scale),
        ),
    )
    return out.reshape(given.shape)


def pairs_left(
    image: UInt8[np.ndarray, "height width 3"],
    *,
    position_sigma: float = 67.0,
    color_sigma: float = 3.0,
    block: int | None = None,
) -> float:
    """Share of all pairs of pixels that `mean_field` evaluates; its time grows with it.

    Args:
      image: as for `mean_field`, and the options, too.
      position_sigma: pixels.
      color_sigma: levels of 0 to 255.
      block: pixels of a block.
    """
    block = _default_block() if block is None else operator.index(block)
    place_scale, color_scale = (0.5 / s**2 for s in (position_sigma, color_sigma))
    blocks = _arrange(image, place_scale, color_scale, block)
    count = len(blocks.features[0])
    return float(2 * blocks.num_pairs - count) / count**2


def _default_block() -> int:
    return BLOCKS.get(jax.default_backend(), LARGE_BLOCK)


def _check_arrays(probabilities: np.ndarray, image: np.ndarray) -> None:
    shape = probabilities.shape
    fits = len(shape) in (3, 4) and image.shape == (*shape[-3:-1], 3)
    if not fits or not probabilities.size:
        raise ValueError(
            f"got probabilities {shape} and an image {image.shape}, expected [height, "
            "width, C] or [n, height, width, C] and [height, width, 3], none of them 0"
        )
    if image.dtype != np.uint8:
        raise ValueError(
            f"got an image of {image.dtype}, expected uint8: pixels as they are in the "
            "file, not normalized"
        )
    if not jnp.issubdtype(probabilities.dtype, np.floating):
        raise ValueError(
            f"got probabilities of {probabilities.dtype}, expected floating point"
        )
    least, most = float(probabilities.min()), float(probabilities.max())
    if not 0 <= least <= most <= MOST_PROBABILITY:  # False for NaN, too
        raise ValueError(
            f"got probabilities from {least:g} to {most:g}, expected 0 to 1: use the "
            "softmax of logits, exp of log-probabilities"
        )


def _check_options(**options: tuple[float | int, float | int, float]) -> None:
    """Options by name: the value, the least and the most it may be."""
    for name, (value, least, most) in options.items():
        if not least <= value <= most:  # False for NaN, too
            allowed = (
                f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            )
            raise ValueError(f"got {name}={value}, expected {allowed}")


# --- On the host: which pixels affect each other --------------------------------------


def _arrange(
    pixels: UInt8[np.ndarray, "height width 3"],
    place_scale: float,
    color_scale: float,
    size: int,
) -> _Blocks:
    """Sorts pixels into blocks by a k-d tree, and lists the pairs of near blocks."""
    rows, columns = np.indices(pixels.shape[:2]).reshape(2, -1)
    features = np.stack([rows, columns, *pixels.reshape(-1, 3).T]).astype(np.float32)
    scale = np.sqrt([place_scale] * 2 + [color_scale] * 3)
    scaled = features * scale[:, None]
    count = -(-len(rows) // size)
    order = np.concatenate(_leaves(scaled, np.arange(len(rows)), count, size))
    place_of = np.argsort(order)
    order = np.pad(order, (0, count * size - len(rows)), mode="edge")
    near = _near(scaled[:, order].reshape(5, count, size), len(rows))
    pairs = np.zeros((2, count * (count + 1) // 2), np.int32)  # same for all images
    pairs[:, : near.shape[1]] = near
    split = features[:, order].reshape(5, count, size)
    return _Blocks(
        tuple(split),
        order.astype(np.int32),
        place_of.astype(np.int32),
        pairs[0],
        pairs[1],
        np.int32(near.shape[1]),
    )


def _leaves(
    scaled: Float64[np.ndarray, "5 N"],
    some: Int[np.ndarray, " n"],
    count: int,
    size: int,
) -> list[np.ndarray]:
    """Splits pixels into `count` blocks of `size`; only the last one may be smaller."""
    if count == 1:
        return [some]
    features = scaled[:, some]
    widest = features[np.argmax(np.ptp(features, axis=1))]
    middle = count // 2 * size
    halves = np.split(some[np.argpartition(widest, middle)], [middle])
    return _leaves(scaled, halves[0], count // 2, size) + _leaves(
        scaled, halves[1], count - count // 2, size
    )


def _near(
    scaled: Float64[np.ndarray, "5 blocks size"], pixels: int
) -> Int[np.ndarray, "2 pairs"]:
    """Pairs of blocks, first <= second, in which exp(−d²/2) may exceed 2⁻²⁴/N."""
    farthest = math.log(pixels / ROUNDING)
    low, high = scaled.min(axis=2), scaled.max(axis=2)
    found = []
    for block in range(scaled.shape[1]):  # one at a time, for the memory's sake
        above = low[:, block:] - high[:, block, None]
        below = low[:, block, None] - high[:, block:]
        gap = np.maximum(np.maximum(above, below), 0)
        second = block + np.flatnonzero(np.sum(gap**2, axis=0) < farthest)
        found.append(np.stack([np.full_like(second, block), second]))
    return np.concatenate(found, axis=1)


def _smoothing(length: int, sigma: float) -> Float32[np.ndarray, "{length} {length}"]:
    """K₁ along one axis, normalized: K₁ of the image is the product over both axes."""
    place = np.arange(length) / sigma
    kernel = np.exp(-0.5 * (place[:, None] - place[None]) ** 2)
    root = np.sqrt(kernel.sum(axis=1))
    return (kernel / root[:, None] / root[None]).astype(np.float32)


# --- On the device --------------------------------------------------------------------


@jax.jit
def _iterate(
    probabilities: Float[Array, "n height width C"],
    blocks: _Blocks,
    smoothing: tuple[Float[Array, "height height"], Float[Array, "width width"]],
    settings: _Settings,
) -> Float[Array, "n height width C"]:
    """The iterations; inside, arrays are [n, C, N], N in the order of the image."""
    n, height, width, classes = probabilities.shape
    clipped = jnp.clip(jnp.moveaxis(probabilities, 3, 1), LEAST_PROBABILITY, 1)
    negative_unary = jnp.log(clipped).reshape(n, classes, height * width)
    real = jnp.arange(len(blocks.order)) < height * width  # the others are filling
    size = blocks.features[0].shape[1]
    sums = _sums(real.astype(jnp.float32).reshape(-1, 1, size), blocks, settings)
    root = lax.rsqrt(sums)  # at least 1: a filling pixel is a copy of a real one

    def appearance(q):
        placed = q.reshape(n * classes, -1)[:, blocks.order]
        placed = jnp.where(real[None], placed, 0)
        split = jnp.moveaxis(placed.reshape(n * classes, -1, size), 1, 0)
        message = jnp.moveaxis(_sums(split * root, blocks, settings) * root, 0, 1)
        return message.reshape(n * classes, -1)[:, blocks.place_of].reshape(q.shape)

    def smoothness(q):
        q_nxCxHxW = q.reshape(n, classes, height, width)
        across = jnp.einsum("xw,nchw->nchx", smoothing[1], q_nxCxHxW, precision=HIGHEST)
        return jnp.einsum("yh,nchx->ncyx", smoothing[0], across, precision=HIGHEST)

    def step(_, q):
        logits = negative_unary + settings.appearance_weight * appearance(q)
        smooth = smoothness(q).reshape(q.shape)
        return jax.nn.softmax(logits + settings.smoothness_weight * smooth, axis=1)

    q = jax.nn.softmax(negative_unary, axis=1)
    q = lax.fori_loop(0, settings.iterations, step, q)
    return jnp.moveaxis(q, 1, 2).reshape(n, height, width, classes)


def _sums(
    values: Float[Array, "blocks m size"], blocks: _Blocks, settings: _Settings
) -> Float[Array, "blocks m size"]:
    """K₂, not normalized, times m arrays of values at the places of the blocks."""

    def add_pair(k, sums):
        i, j = blocks.first[k], blocks.second[k]
        kernel = _kernel(blocks.features, i, j, settings)
        into_i = lax.dot_general(
            values[j], kernel, (((1,), (1,)), ((), ())), precision=HIGHEST
        )
        into_j = jnp.matmul(values[i], kernel, precision=HIGHEST)
        sums = sums.at[i].add(into_i)
        return sums.at[j].add(jnp.where(i == j, 0, into_j))

    return lax.fori_loop(0, blocks.num_pairs, add_pair, jnp.zeros_like(values))


def _kernel(
    features: tuple[Numbers, ...],
    i: Int[Array, ""],
    j: Int[Array, ""],
    settings: _Settings,
) -> Float[Array, "size size"]:
    """exp(−d²/2) between the pixels of blocks i (rows) and j (columns)."""
    # One array for each feature: of a stacked one, XLA's CPU loop is not vectorized.
    squares = [jnp.square(x[i][:, None] - x[j][None]) for x in features]
    place = squares[0] + squares[1]
    color = squares[2] + squares[3] + squares[4]
    return jnp.exp(-(place * settings.place_scale + color * settings.color_scale))
