"""The two probes of unsupervised segmentation, which STEGO and CAUSE share.

    codes [B, h, w, Z] --linear_loss--> of a linear layer that is trained on labels
    codes --log_probabilities--> of classes, by the linear layer
    codes, centroids [C, Z] --cluster_log_probabilities--> of clusters, by cosine

Sources: mhamilton723/STEGO train_segmentation.py and modules.py `ClusterLookup`;
CAUSE-TR has the same two with another temperature.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from sinder_jax.evals import segmentation

HIGHEST = "highest"
LEAST_NORM = 1e-12  # PyTorch's, below which `normalize` divides by it


class Linear(NamedTuple):
    """A linear layer from codes to classes, which is a 1 x 1 convolution."""

    kernel: Float[Array, "Z C"]
    bias: Float[Array, " C"]


def uniform(key: Array, shape: Sequence[int], fan_in: int) -> Float[Array, "..."]:
    """Draws from U(-1/√fan_in, 1/√fan_in).

    PyTorch starts weights and biases of `Linear` and `Conv2d` so; Flax's defaults are
    others.

    Args:
      key: random key.
      shape: of the result.
      fan_in: inputs of the layer.
    """
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, tuple(shape), jnp.float32, -bound, bound)


def init_linear(key: Array, dim: int, num_classes: int) -> Linear:
    """A linear layer as PyTorch starts it.

    Args:
      key: random key.
      dim: Z, at least 1.
      num_classes: C, 2 to 255.

    Raises:
      ValueError: a number out of range.
    """
    if dim < 1 or not 2 <= num_classes <= segmentation.IGNORE:
        raise ValueError(
            f"got codes of width {dim} and {num_classes} classes, expected a width of "
            f"at least 1 and 2 to {segmentation.IGNORE} classes"
        )
    kernel, bias = jax.random.split(key)
    return Linear(
        uniform(kernel, (dim, num_classes), dim), uniform(bias, (num_classes,), dim)
    )


def linear_loss(
    linear: Linear,
    codes: Float[Array, "B h w Z"],
    labels: Integer[Array, "B height width"],
) -> Float[Array, ""]:
    """Mean cross entropy of pixels, in nats; logits are resized to the labels.

    The resize is bilinear, `bilinear.bilinear_weights`. Pixels are computed image by
    image with their gradient, so there is never an array as large as the pixels of a
    batch times the classes.

    Args:
      linear: the layer.
      codes: of patches. To train the layer alone, pass them by `lax.stop_gradient`.
      labels: classes; pixels with a label below 0 or of C and above do not count.

    Returns:
      The mean over the pixels that count; 0 if there is none.
    """
    return _mean_cross_entropy(_logits(linear, codes), labels)


@jax.custom_vjp
def _mean_cross_entropy(logits: Array, labels: Array) -> Array:
    return _loss_and_slope(logits, labels)[0]


def _loss_and_slope(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The mean over the pixels that count, and its gradient by the logits."""
    counts = (labels >= 0) & (labels < logits.shape[-1])
    known = jnp.where(counts, labels, segmentation.IGNORE)
    gradient_of_one = jax.value_and_grad(segmentation.cross_entropy)
    sums, slopes = lax.map(lambda pair: gradient_of_one(*pair), (logits, known))
    pixels = jnp.maximum(jnp.sum(counts), 1)
    return jnp.sum(sums) / pixels, slopes / pixels


def _pull_back(slope: Array, cotangent: Array) -> tuple[Array, None]:
    return cotangent * slope, None


_mean_cross_entropy.defvjp(_loss_and_slope, _pull_back)


def log_probabilities(
    linear: Linear, codes: Float[Array, "*shape Z"]
) -> Float[Array, "*shape C"]:
    """Log-probabilities of the classes of codes."""
    return jax.nn.log_softmax(_logits(linear, codes))


def _logits(linear: Linear, codes: Array) -> Array:
    logits = jnp.matmul(codes, linear.kernel, precision=HIGHEST)
    return logits + jnp.broadcast_to(linear.bias, logits.shape)


def cluster_log_probabilities(
    codes: Float[Array, "*shape Z"], centroids: Float[Array, "C Z"], alpha: float
) -> Float[Array, "*shape C"]:
    """Log-probabilities of the clusters: log softmax(alpha·cos(code, centroid)).

    Codes are resized before, not these: the cosine is not linear.

    Args:
      codes: of patches or pixels.
      centroids: one for each cluster.
      alpha: inverse temperature; 2 in STEGO, 3 in CAUSE.
    """
    return jax.nn.log_softmax(alpha * cosines(codes, centroids))


def cosines(
    codes: Float[Array, "*shape Z"], centroids: Float[Array, "C Z"]
) -> Float[Array, "*shape C"]:
    """Cosine of each code to each centroid; 0 for a code of zeros."""
    return jnp.matmul(normalize(codes), normalize(centroids).T, precision=HIGHEST)


def normalize(
    x: Float[Array, "*shape Z"], least: float = LEAST_NORM
) -> Float[Array, "*shape Z"]:
    """Unit vectors, x / max(|x|, least) along the last axis: PyTorch's `F.normalize`.

    As x·(max(|x|², least²))^-½, whose gradient at 0 is finite, as PyTorch's is.
    """
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, least**2))
