"""CAUSE's codebook: code vectors for frozen features, found by maximal modularity.

    features [B, H, W, D] --sample_cells--> x [B, n, D], a token of each 4 x 4 cell
    x, codebook --modularity_loss--> how badly the codes split the graph of tokens
    features, codebook --quantize--> code vector and code of each token

Cited are functions of ByungKwanLee/Causal-Unsupervised-Segmentation,
modules/segment_module.py. The same loss trains the clusters of the third stage.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num, Shaped

from sinder_jax.evals.probes import cosines, normalize

CELL = 4  # tokens of a side of a cell, of which one is sampled
SHARPNESS = 0.1  # two tokens share a code if the product of their cosines exceeds this
HIGHEST = "highest"

Numbers = Array | np.ndarray  # of the host or of a device


# --- Grid sampling --------------------------------------------------------------------


def draw_order(
    key: Array, images: int, height: int, width: int
) -> Int[Array, "images n"]:
    """Draws which of the 16 tokens of each cell is sampled, uniformly.

    Args:
      key: random key.
      images: B.
      height: H, rows of tokens.
      width: W, columns of tokens.

    Returns:
      int32, 0 to 15; see `sample_cells`.
    """
    cells = (height // CELL) * (width // CELL)
    return jax.random.randint(key, (images, cells), 0, CELL * CELL, jnp.int32)


def sample_cells(
    maps: Shaped[Array, "B H W C"], order: Int[Array, "B n"]
) -> Shaped[Array, "B n C"]:
    """The chosen token of each 4 x 4 cell (`grid_sample` of the original).

    Cells do not overlap; rows and columns that are left over at the end are never used.

    Args:
      maps: anything that has a vector for each token.
      order: 4·row + column of the token inside its cell, for the cells of each image
        row by row. Maps that are sampled by one order stay aligned.

    Raises:
      ValueError: an order for another number of cells.
    """
    images, height, width, channels = maps.shape
    rows, columns = height // CELL, width // CELL
    if order.shape != (images, rows * columns):
        raise ValueError(
            f"got an order {order.shape} for maps {maps.shape}, expected "
            f"[{images}, {rows * columns}]: one token of each {CELL} x {CELL} cell"
        )
    cells = maps[:, : rows * CELL, : columns * CELL].reshape(
        images, rows, CELL, columns, CELL, channels
    )
    cells = jnp.swapaxes(cells, 2, 3).reshape(images, -1, CELL * CELL, channels)
    return jnp.take_along_axis(cells, order[:, :, None, None], axis=2)[:, :, 0]


# --- Codes ----------------------------------------------------------------------------


def init_codebook(key: Array, codes: int, dim: int) -> Float[Array, "K dim"]:
    """Code vectors from U(±1/codes); also the clusters of the third stage.

    Adam's first steps, 1e-3 and more each, are larger than that, so the range matters.
    """
    return jax.random.uniform(key, (codes, dim), jnp.float32, -1 / codes, 1 / codes)


def quantize(
    tokens: Float[Array, "*shape D"], codebook: Float[Array, "K D"]
) -> tuple[Float[Array, "*shape D"], Int[Array, "*shape"]]:
    """The code vector with the largest cosine to each token, and its number (`vqt`).

    Of equal ones the first. Code vectors keep their length, in which the head sees
    them.
    """
    codes = jnp.argmax(cosines(tokens, codebook), axis=-1).astype(jnp.int32)
    return codebook[codes], codes


def modularity_loss(
    x: Num[Numbers, "*images n D"], codebook: Num[Numbers, "K _"]
) -> Float[Array, ""]:
    """Negative modularity of the split of an image's tokens into codes.

    The graph of an image has the edges A = max(cos(x_i, x_j), 0), i ≠ j, the degrees
    d = A·1 and the weight e = Σ A. With C = max(cos(x_i, code k), 0):

        loss = -Σ_ij (A - d dᵀ/e)_ij / e · max_k tanh(C_ik C_jk / 0.1)

    The diagonal, -d_i²/e, takes part. The gradient reaches, of each pair (i, j), only
    the first of the codes with the largest product; that of max(C, 0) is 1 at 0, as of
    PyTorch's `clamp`.

    Args:
      x: tokens of one image [n, D] or of several [B, n, D]; no gradient flows to them.
      codebook: code vectors of any length.

    Returns:
      The mean over images; an image without an edge counts as 0.

    Raises:
      ValueError: another number of axes, or of features.
    """
    x, codebook = jnp.asarray(x), jnp.asarray(codebook)
    dim = codebook.shape[-1]
    if x.ndim not in (2, 3) or x.shape[-1] != dim:
        raise ValueError(
            f"got tokens {x.shape} for a codebook {codebook.shape}, expected "
            f"[n, {dim}] or [images, n, {dim}]"
        )
    return _modularity_loss(x if x.ndim == 3 else x[None], codebook)


@jax.jit
def _modularity_loss(
    images: Float[Array, "B n D"], codebook: Float[Array, "K D"]
) -> Float[Array, ""]:
    codes = normalize(codebook)
    return jnp.mean(jax.vmap(lambda x: _of_image(x, codes))(lax.stop_gradient(images)))


def _of_image(x: Float[Array, "n D"], codes: Float[Array, "K D"]) -> Float[Array, ""]:
    edges = jnp.maximum(cosines(x, x), 0) * (1 - jnp.eye(len(x)))
    degrees = jnp.sum(edges, axis=1)
    weight = jnp.sum(degrees)
    weight = jnp.where(weight > 0, weight, 1)  # all are 0 then
    surplus = edges - jnp.outer(degrees, degrees) / weight
    near = jnp.matmul(normalize(x), codes.T, precision=HIGHEST)
    near = jnp.where(near >= 0, near, 0)
    shared = jnp.argmax(
        lax.stop_gradient(near[:, None, :] * near[None, :, :]), axis=-1
    )  # tanh does not change which one is largest
    own = jnp.take_along_axis(near, shared, axis=1)
    product = own * own.T  # `shared` is symmetric: C_ik C_jk at k = shared[i, j]
    return -jnp.sum(surplus * jnp.tanh(product / SHARPNESS)) / weight
