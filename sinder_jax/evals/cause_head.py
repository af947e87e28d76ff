"""CAUSE-TR's segmentation head: a decoder block that asks quantized tokens.

    quantized tokens + queries --self-attention, cross-attention to tokens, FFN--> x
    tokens + x --linear + nonlinear projection--> code of each token, [B, H, W, 90]

Source: ByungKwanLee/Causal-Unsupervised-Segmentation, modules/segment.py and
`TRDecoder`, `Decoder` of modules/segment_module.py: PyTorch's post-norm
`TransformerDecoderLayer` with one attention head, all dropouts 0.1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sinder_jax.evals import probes
from sinder_jax.evals.probes import Linear

REDUCED = 90  # numbers of a code
PROJECTED = 2_048  # numbers of its projection, which the contrastive loss compares
HIDDEN = 2_048  # of the FFN, for any D
DROPOUT = 0.1
DROPOUTS = 8  # places of the head that have one
NORM_EPSILON = 1e-5
HIGHEST = "highest"


class Norm(NamedTuple):
    """A LayerNorm's parameters."""

    scale: Float[Array, " D"]
    shift: Float[Array, " D"]


class Attention(NamedTuple):
    """One attention head.

    Attributes:
      qkv: kernel [D, 3D] of queries, keys and values, in this order.
      out: kernel [D, D].
    """

    qkv: Linear
    out: Linear


class Head(NamedTuple):
    """Parameters: 25 arrays, as many as the original has tensors.

    Attributes:
      queries: a learned query for each token; train and test images have the same N.
      self_attention, cross_attention, wide, narrow, norms: of the decoder block.
      linear: D -> reduced.
      hidden, nonlinear: D -> D -> reduced.
    """

    queries: Float[Array, "N D"]
    self_attention: Attention
    cross_attention: Attention
    wide: Linear
    narrow: Linear
    norms: tuple[Norm, Norm, Norm]
    linear: Linear
    hidden: Linear
    nonlinear: Linear


def init(key: Array, tokens: int, dim: int, reduced: int = REDUCED) -> Head:
    """A new head, by PyTorch's initial distributions.

    Args:
      key: random key.
      tokens: N of an image.
      dim: D, width of the features.
      reduced: numbers of a code.
    """
    keys = iter(jax.random.split(key, 8))
    norm = Norm(jnp.ones(dim), jnp.zeros(dim))
    return Head(
        queries=jax.random.normal(next(keys), (tokens, dim)),
        self_attention=_init_attention(next(keys), dim),
        cross_attention=_init_attention(next(keys), dim),
        wide=init_linear(next(keys), dim, HIDDEN),
        narrow=init_linear(next(keys), HIDDEN, dim),
        norms=(norm, Norm(*map(jnp.copy, norm)), Norm(*map(jnp.copy, norm))),
        linear=init_linear(next(keys), dim, reduced),
        hidden=init_linear(next(keys), dim, dim),
        nonlinear=init_linear(next(keys), dim, reduced),
    )


def init_linear(key: Array, inputs: int, outputs: int) -> Linear:
    """A linear layer as PyTorch starts it."""
    kernel, bias = jax.random.split(key)
    return Linear(
        probes.uniform(kernel, (inputs, outputs), inputs),
        probes.uniform(bias, (outputs,), inputs),
    )


def _init_attention(key: Array, dim: int) -> Attention:
    """`MultiheadAttention`: Xavier's bound for the three kernels as one, no biases."""
    into, out = jax.random.split(key)
    bound = math.sqrt(6 / (4 * dim))
    kernel = jax.random.uniform(into, (dim, 3 * dim), jnp.float32, -bound, bound)
    return Attention(
        Linear(kernel, jnp.zeros(3 * dim)),
        Linear(probes.uniform(out, (dim, dim), dim), jnp.zeros(dim)),
    )


def apply(
    head: Head,
    features: Float[Array, "B H W D"],
    quantized: Float[Array, "B H W D"],
    *,
    key: Array | None = None,
) -> Float[Array, "B H W reduced"]:
    """Codes of tokens.

    Args:
      head: parameters.
      features: tokens of the frozen model after its final norm.
      quantized: their code vectors, from `modularity.quantize`.
      key: of the dropouts; None: without, for inference.

    Raises:
      ValueError: tokens that do not fit the head.
    """
    tokens, dim = head.queries.shape
    _, height, width, _ = features.shape
    if (height * width, features.shape[-1]) != (tokens, dim):
        raise ValueError(
            f"got features {features.shape}, {height * width} tokens of an image, "
            f"expected the {tokens} of {dim} numbers that the head was made for: "
            "training and test images have the same size"
        )
    asked, asking = (x.reshape(-1, tokens, dim) for x in (features, quantized))
    found = _codes(head, asked, asking, _dropouts(key))
    return found.reshape(-1, height, width, found.shape[-1])


def _codes(
    head: Head,
    features: Float[Array, "B N D"],
    quantized: Float[Array, "B N D"],
    drop: Callable[[Array], Array],
) -> Float[Array, "B N reduced"]:
    queries = head.queries[None]
    first, second, third = head.norms
    asking = quantized + queries
    found = _attend(head.self_attention, asking, asking, quantized, drop)
    x = _normalize(first, quantized + drop(found))
    found = _attend(head.cross_attention, x + queries, features, features, drop)
    x = _normalize(second, x + drop(found))
    inner = drop(jax.nn.relu(linear(head.wide, x)))
    x = _normalize(third, x + drop(linear(head.narrow, inner)))
    x = features + x  # not what entered the FFN
    nonlinear = jax.nn.relu(linear(head.hidden, drop(x)))
    return linear(head.linear, drop(x)) + linear(head.nonlinear, nonlinear)


def linear(layer: Linear, x: Float[Array, "*rows n"]) -> Float[Array, "*rows m"]:
    """A linear layer's output."""
    product = jnp.matmul(x, layer.kernel, precision=HIGHEST)
    return product + jnp.broadcast_to(layer.bias, product.shape)


def _dropouts(key: Array | None) -> Callable[[Array], Array]:
    """A function with a mask of its own at each call, element by element."""
    if key is None:
        return lambda x: x
    keys = iter(jax.random.split(key, DROPOUTS))

    def drop(x: Array) -> Array:
        kept = jax.random.bernoulli(next(keys), 1 - DROPOUT, x.shape)
        return jnp.where(kept, x / (1 - DROPOUT), 0)

    return drop


def _attend(
    attention: Attention,
    queries: Float[Array, "B N D"],
    keys: Float[Array, "B M D"],
    values: Float[Array, "B M D"],
    drop: Callable[[Array], Array],
) -> Float[Array, "B N D"]:
    kernels = jnp.split(attention.qkv.kernel, 3, axis=1)
    biases = jnp.split(attention.qkv.bias, 3)
    q, k, v = (
        linear(Linear(*layer), x)
        for *layer, x in zip(kernels, biases, (queries, keys, values), strict=True)
    )
    scores = jnp.einsum("bnd,bmd->bnm", q, k, precision=HIGHEST)
    weights = drop(jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1))
    return linear(
        attention.out, jnp.einsum("bnm,bmd->bnd", weights, v, precision=HIGHEST)
    )


def _normalize(norm: Norm, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    scale, shift = (jnp.broadcast_to(each, x.shape) for each in norm)
    return centered * lax.rsqrt(variance + NORM_EPSILON) * scale + shift
