"""softmax(q·kᵀ/√K)·v and its gradient, in the fastest way for each kind of device.

    q, k, v [B, M, T, K] --two heads at a time (CPU) | all at once--> mixed [B, M, T, K]

Both ways compute the same sums in the same number format, in a different order. The
gradient is written out because the one that JAX derives takes three times as long on a
CPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# On a CPU, where the logits of so few heads stay in the cache. At giant width and 1,370
# tokens 2 were twice as fast as all 24, and 4 slower than 1 (benchmarks/NOTES.md).
HEADS_AT_A_TIME = 2

Heads = Float[Array, "B M T K"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mix(q: Heads, k: Heads, v: Heads, precision: Any) -> Heads:
    """Averages the values by softmax(q·kᵀ/√K), head by head.

    Args:
      q: queries.
      k: keys.
      v: values.
      precision: of every product.
    """
    return _in_groups(functools.partial(_forward, precision), q, k, v)


def _mix_forward(q, k, v, precision):
    return mix(q, k, v, precision), (q, k, v)


def _mix_backward(precision, residuals, d_mixed):
    # Computes the weights again: cheaper than keeping 180 MB per block at giant size.
    return _in_groups(functools.partial(_backward, precision), *residuals, d_mixed)


mix.defvjp(_mix_forward, _mix_backward)


def _forward(precision: Any, q: Heads, k: Heads, v: Heads) -> Heads:
    weights = _weights(precision, q, k)
    return jnp.einsum("BMTS,BMSK->BMTK", weights, v, precision=precision)


def _backward(
    precision: Any, q: Heads, k: Heads, v: Heads, d_mixed: Heads
) -> tuple[Heads, Heads, Heads]:
    """d_weights = d_mixed·vᵀ; d_logits = weights·(d_weights − Σ weights·d_weights)."""
    product = functools.partial(jnp.einsum, precision=precision)
    weights = _weights(precision, q, k)
    d_v = product("BMTS,BMTK->BMSK", weights, d_mixed)
    d_weights = product("BMTK,BMSK->BMTS", d_mixed, v)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_logits = weights * (d_weights - mean) * q.shape[-1] ** -0.5
    d_q = product("BMTS,BMSK->BMTK", d_logits, k)
    return d_q, product("BMTS,BMTK->BMSK", d_logits, q), d_v


def _weights(precision: Any, q: Heads, k: Heads) -> Float[Array, "B M T S"]:
    q = q * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.einsum("BMTK,BMSK->BMTS", q, k, precision=precision))


def _in_groups(function: Callable[..., Any], *heads: Heads) -> Any:
    """`function` of all heads at once or, on a CPU, of two heads at a time."""

    def two_at_a_time(*heads: Heads) -> Any:
        batch, number, *rest = heads[0].shape
        together = HEADS_AT_A_TIME if number % HEADS_AT_A_TIME == 0 else 1
        groups = tuple(x.reshape(-1, 1, together, *rest) for x in heads)
        results = lax.map(lambda group: function(*group), groups)
        return jax.tree.map(lambda x: x.reshape(batch, number, *rest), results)

    return lax.platform_dependent(*heads, cpu=two_at_a_time, default=function)
