"""The layers of the ViT whose kernel is trained through its factors.

x --SpectralDense--> ((x·V)·s)·Uᵀ + b      x --MergedDense--> x·kernel + b
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
# Of the largest singular value: dividing by a smaller one would make float32's rounding
# of 1e-7 more than the 1e-4 by which ε-gradients may be off.
SMALL = 1e-3


class SpectralDense(nn.Module):
    """y = ((x·V)·s)·Uᵀ + b, of which only s is a parameter.

    Collections: `params` {s [S]}, `factors` {u [out, S], v [in, S]}, `frozen` {bias}.
    """

    features: int
    precision: Any = HIGHEST

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        size = min(x.shape[-1], self.features)
        s = jnp.asarray(self.param("s", nn.initializers.ones, (size,)))
        u, v = _factor_variables(self, x.shape[-1], self.features)
        bias = _frozen_bias(self, self.features)
        xv = jnp.matmul(x, v, precision=self.precision)
        return jnp.matmul(_scale(xv, s), u.T, precision=self.precision) + _row(bias, x)


class MergedDense(nn.Module):
    """y = x·kernel + b with kernel = V·diag(σ + ε)·Uᵀ merged beforehand.

    The gradient reaches ε directly, not through the kernel's (`merged_product`).
    Collections: `params` {eps [S]}, `merged` {kernel}, `factors` {u, sigma, v},
    `frozen` {bias}, the same U and V as in `SpectralDense`; where `known` {y} is given,
    y is what this very layer computed before, and only its gradient is of interest.
    """

    features: int
    precision: Any = HIGHEST

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        size = min(x.shape[-1], self.features)
        eps = self.param("eps", nn.initializers.zeros, (size,))
        u, v = _factor_variables(self, x.shape[-1], self.features)
        sigma = self.variable("factors", "sigma", jnp.ones, (size,)).value
        kernel = self.variable(
            "merged",
            "kernel",
            lambda: jnp.matmul(v * (1 + eps)[None, :], u.T, precision=HIGHEST),
        )
        bias = _frozen_bias(self, self.features)
        y = None
        if self.has_variable("known", "y"):
            y = jnp.asarray(self.get_variable("known", "y"))
            y = y - _row(bias, y)
        y = merged_product(self.precision, x, kernel.value, u, sigma, v, eps, y)
        return y + _row(bias, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged_product(
    precision: Any,
    x: Float[Array, "*batch in"],
    kernel: Float[Array, "in out"],
    u: Float[Array, "out S"],
    sigma: Float[Array, " S"],
    v: Float[Array, "in S"],
    eps: Float[Array, " S"],
    y: Float[Array, "*batch out"] | None = None,
) -> Float[Array, "*batch out"]:
    """x·kernel whose derivative by ε is taken through the factors of the kernel.

    With y = x·V·diag(s)·Uᵀ and s = σ + ε, ∂loss/∂ε_i = Σ_tokens (dy·u_i)(x·v_i): two
    products with the factors instead of the kernel's gradient and its projection. The
    one with the longer side need not be computed: y·u_i = s_i (x·v_i), and y is known
    where it is given; dx·v_i = s_i (dy·u_i), and dx is computed anyhow.

    Args:
      precision: of the products.
      x: input.
      kernel: V·diag(σ + ε)·Uᵀ.
      u: output side of the factors.
      sigma: singular values of the original kernel.
      v: input side.
      eps: their changes.
      y: x·kernel, where it has been computed before.
    """
    del u, sigma, v, eps
    return jnp.matmul(x, kernel, precision=precision) if y is None else y


def _merged_product_forward(precision, x, kernel, u, sigma, v, eps, y):
    out = merged_product(precision, x, kernel, u, sigma, v, eps, y)
    return out, (x, kernel, u, sigma + eps, v, y)


def _merged_product_backward(precision, residuals, dy):
    x, kernel, u, s, v, y = residuals

    def times(a, b):
        return jnp.matmul(a, b, precision=precision)

    dx = times(dy, kernel.T)
    width_in, width_out = kernel.shape
    if width_out > width_in:
        xv = times(x, v)
        dyu = _unless_small(s, lambda: times(dx, v), lambda: times(dy, u))
    elif width_in > width_out and y is not None:
        dyu = times(dy, u)
        xv = _unless_small(s, lambda: times(y, u), lambda: times(x, v))
    else:
        dyu, xv = times(dy, u), times(x, v)
    tokens = tuple(range(dy.ndim - 1))
    return dx, None, None, None, None, jnp.sum(dyu * xv, axis=tokens), None


def _unless_small(
    s: Float[Array, " S"], scaled: Callable[[], Array], direct: Callable[[], Array]
) -> Array:
    """scaled() / s, which is direct(), unless a small s would amplify its rounding."""

    def divided() -> Array:
        product = scaled()
        return product / _row(s, product)

    size = jnp.abs(s)
    return lax.cond(jnp.min(size) > SMALL * jnp.max(size), divided, direct)


merged_product.defvjp(_merged_product_forward, _merged_product_backward)


def _factor_variables(
    module: nn.Module, width_in: int, width_out: int
) -> tuple[Float[Array, "out S"], Float[Array, "in S"]]:
    """U [out, S] and V [in, S] of a layer; orthonormal columns when initialized."""
    size = min(width_in, width_out)
    orthonormal = nn.initializers.orthogonal()

    def variable(name: str, width: int) -> Array:
        def init() -> Array:
            return orthonormal(module.make_rng("params"), (width, size))

        return jnp.asarray(module.variable("factors", name, init).value)

    return variable("u", width_out), variable("v", width_in)


def _frozen_bias(module: nn.Module, width: int) -> Float[Array, " out"]:
    return jnp.asarray(module.variable("frozen", "bias", jnp.zeros, (width,)).value)


def _row(vector: Float[Array, " D"], x: Float[Array, "*batch _"]) -> Array:
    """`vector` with leading axes of size one, to meet the rank of `x`."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _scale(x: Float[Array, "*batch S"], s: Float[Array, " S"]) -> Array:
    return x * _row(s, x)
