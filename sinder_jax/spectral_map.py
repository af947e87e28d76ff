"""The linear map of a block as a function of the singular values of its kernels.

    weights, factors --of_block--> SpectralBlock
    SpectralBlock, s = σ + ε, vectors --apply--> E·vectors, differentiable by s

The same map as `defects.block_map`, in JAX and without forming a matrix: a kernel acts
as U·diag(s)·Vᵀ, and the slopes of the FFN's hidden layer, which depend on its first
kernel, are differentiated exactly. Meant for float64, in `jax.enable_x64(True)`.

A gate that opens for few tokens hardly shows in a fit to x ~ N(0, I). So the fit may be
to x ~ N(0, I + r·rᵀ) instead: some tokens lie far out along r.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from sinder_jax.analysis.tokens import AnyArray
from sinder_jax.defects import QUADRATURE
from sinder_jax.factor import KernelFactors
from sinder_jax.kernels import BlockWeights

Values = Sequence[Any]
"""Singular values [S] of the four trainable kernels, ordered as `kernels.names`."""


@struct.dataclass
class SpectralBlock:
    """What the map of one block is made of, but for the singular values; float64.

    Attributes:
      u, v: output and input side of the four kernels, [out, S] and [in, S].
      bias, scale1, gamma1, scale2, gamma2: as in `kernels.BlockWeights`.
      reach: r of the FFN's inputs; zeros give the map of `defects.block_map`.
      ffn_layer: "mlp" or "swiglu".
    """

    u: tuple[Any, ...]
    v: tuple[Any, ...]
    bias: Any
    scale1: Any
    gamma1: Any
    scale2: Any
    gamma2: Any
    reach: Any
    ffn_layer: str = struct.field(pytree_node=False)


def of_block(
    weights: BlockWeights,
    factors: Sequence[KernelFactors],
    reach: Float[np.ndarray, " D"],
) -> SpectralBlock:
    """The block of these weights.

    Args:
      weights: of the block; its kernels are not used.
      factors: of its four kernels; their singular values are not used.
      reach: see `SpectralBlock`.
    """
    u, v = (
        tuple(np.asarray(getattr(each, side), np.float64) for each in factors)
        for side in ("u", "v")
    )
    vectors = (weights.scale1, weights.gamma1, weights.scale2, weights.gamma2)
    return SpectralBlock(u, v, weights.bias, *vectors, reach, weights.ffn_layer)


def apply(
    block: SpectralBlock, s: Values, x: Float[AnyArray, "D n"]
) -> Float[Array, "D n"]:
    """E·x = M·A·x of `defects.block_map`, for vectors in columns.

    Args:
      block: the block.
      s: singular values of its four kernels.
      x: any vectors.
    """
    inner = _normed(x, block.scale1)
    for kernel in (0, 1):
        inner = _kernel(block, kernel, s, inner)
    x = x + block.gamma1[:, None] * inner
    up = _kernel(block, 2, s, _normed(x, block.scale2))
    slopes = hidden_slopes(block, s[2])
    hidden = (slopes[:, :, None] * up.reshape(*slopes.shape, -1)).sum(axis=0)
    return x + block.gamma2[:, None] * _kernel(block, 3, s, hidden)


def _normed(x: Float[AnyArray, "D n"], scale: Any) -> Float[Array, "D n"]:
    """What is linear in a LayerNorm: diag(g)·C·x."""
    return scale[:, None] * (x - x.mean(axis=0, keepdims=True))


def _kernel(
    block: SpectralBlock, kernel: int, s: Values, x: Float[Array, "in n"]
) -> Float[Array, "out n"]:
    return block.u[kernel] @ (s[kernel][:, None] * (block.v[kernel].T @ x))


def hidden_slopes(
    block: SpectralBlock, s: Float[AnyArray, " S"]
) -> Float[Array, "parts F"]:
    """`defects.hidden_slopes` of the first FFN kernel U·diag(s)·Vᵀ, for any reach.

    A hidden unit's a = w·x + b has the variance ‖w‖² + (w·r)². V is orthogonal (a
    hidden layer is no narrower than a token), so that inner products of the kernel's
    rows are those of the rows of U·diag(s).
    """
    rows = block.u[2] * s[None, :]
    rows = jnp.concatenate([rows, rows @ (block.v[2].T @ block.reach)[:, None]], axis=1)
    if block.ffn_layer == "swiglu":
        return _swiglu_slopes(rows, block.bias)
    spread = 1 + jnp.sum(rows**2, axis=1)
    t = block.bias / jnp.sqrt(spread)
    return (ndtr(t) + norm.pdf(t) * block.bias / spread**1.5)[None]


def _swiglu_slopes(rows: Float[Array, "up n"], bias: Any) -> Float[Array, "parts F"]:
    (w1, w2), (b1, b2) = jnp.split(rows, 2), jnp.split(bias, 2)
    variance = jnp.sum(w1**2, axis=1)
    positive = jnp.where(variance > 0, variance, 1.0)  # keeps gradients finite
    slope = jnp.sum(w1 * w2, axis=1) / positive
    spread = jnp.where(variance > 0, jnp.sqrt(positive), 0.0)
    density = norm.pdf(QUADRATURE) * (QUADRATURE[1] - QUADRATURE[0])
    deviation = spread[:, None] * QUADRATURE[None, :]
    a = b1[:, None] + deviation
    c = b2[:, None] + slope[:, None] * deviation
    gate = jax.nn.sigmoid(a)
    silu, dsilu = a * gate, gate * (1 + a * (1 - gate))
    return jnp.stack([(dsilu * c) @ density, silu @ density])
