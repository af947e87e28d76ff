"""The layers of the ViT: plain ones, and those that train singular values only.

    x --Dense--> x·kernel + b
    x --SpectralDense--> ((x·V)·s)·Uᵀ + b      trains s = σ + ε
    x --MergedDense--> x·kernel + b            trains ε of kernel = V·diag(σ + ε)·Uᵀ

The last two stand in for the first in a model that is repaired. There the collection
`params` holds what is trained, `factors` U, σ and V, `merged` the kernels with ε folded
in, and `frozen` every weight that a repair reads and never changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
# Of the largest singular value: dividing by a smaller one would make float32's rounding
# of 1e-7 more than the 1e-4 by which ε-gradients may be off.
SMALL = 1e-3
NORMAL = nn.initializers.truncated_normal(0.02)
ORTHONORMAL = nn.initializers.orthogonal()
ZEROS, ONES = nn.initializers.zeros, nn.initializers.ones


def weight(
    module: nn.Module,
    name: str,
    init: Any,
    shape: tuple[int, ...],
    *,
    frozen: bool = True,
    collection: str = "frozen",
) -> Array:
    """A weight of a module: a parameter or, if frozen, a variable of `collection`."""
    if not frozen:
        return jnp.asarray(module.param(name, init, shape))
    variable = module.variable(
        collection, name, lambda: init(module.make_rng("params"), shape)
    )
    return jnp.asarray(variable.value)  # converters and checkpoints hold NumPy arrays


def factors(
    module: nn.Module, width_in: int, width_out: int
) -> tuple[Float[Array, "out S"], Float[Array, "in S"]]:
    """U [out, S] and V [in, S] of a layer; orthonormal columns when initialized."""
    size = min(width_in, width_out)
    own = functools.partial(weight, module, init=ORTHONORMAL, collection="factors")
    return own("u", shape=(width_out, size)), own("v", shape=(width_in, size))


def along(vector: Float[Array, " D"], x: Float[Array, "*batch _"]) -> Array:
    """`vector` with leading axes of size one, to meet the rank of `x`."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


# --- Layers that are not factored -----------------------------------------------------


class Dense(nn.Module):
    """y = x·kernel + b."""

    features: int
    precision: Any = HIGHEST
    frozen: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        own = functools.partial(weight, self, frozen=self.frozen)
        kernel = own("kernel", NORMAL, (x.shape[-1], self.features))
        bias = own("bias", ZEROS, (self.features,))
        y = jnp.matmul(x, kernel, precision=self.precision)
        return y + along(bias, y)


class LayerNorm(nn.Module):
    """Normalization over the last axis, in two passes: defective tokens are huge."""

    epsilon: float
    frozen: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        own = functools.partial(weight, self, shape=x.shape[-1:], frozen=self.frozen)
        scale, bias = own("scale", ONES), own("bias", ZEROS)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(variance + self.epsilon)
        # Rounded in the order of PyTorch's kernel: a token about to become defective
        # amplifies a rounding by 100 (measured on tests/golden/moving).
        normalized = x * inverse - mean * inverse
        return normalized * along(scale, x) + along(bias, x)


class LayerScale(nn.Module):
    """x·γ, one factor per channel."""

    frozen: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gamma = weight(self, "gamma", ONES, x.shape[-1:], frozen=self.frozen)
        return x * along(gamma, x)


class PatchEmbed(nn.Module):
    """Linear map of each patch of pixels: a convolution whose stride is the patch."""

    features: int
    patch_size: int
    precision: Any = HIGHEST
    frozen: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "B height width 3"]
    ) -> Float[Array, "B N D"]:
        patch, own = self.patch_size, functools.partial(weight, frozen=self.frozen)
        kernel = own(self, "kernel", NORMAL, (patch, patch, 3, self.features))
        bias = own(self, "bias", ZEROS, (self.features,))
        pixels = rearrange(
            images, "B (H p) (W q) c -> B (H W) (p q c)", p=patch, q=patch
        )
        kernel = kernel.reshape(-1, self.features)
        x = jnp.matmul(pixels, kernel, precision=self.precision)
        return x + along(bias, x)


# --- Layers that train singular values ------------------------------------------------


class SpectralDense(nn.Module):
    """y = ((x·V)·s)·Uᵀ + b, of which only s is a parameter.

    Collections: `params` {s [S]}, `factors` {u [out, S], v [in, S]}, `frozen` {bias}.
    """

    features: int
    precision: Any = HIGHEST

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        size = min(x.shape[-1], self.features)
        s = jnp.asarray(self.param("s", ONES, (size,)))
        u, v = factors(self, x.shape[-1], self.features)
        bias = weight(self, "bias", ZEROS, (self.features,))
        xv = jnp.matmul(x, v, precision=self.precision)
        y = jnp.matmul(xv * along(s, xv), u.T, precision=self.precision)
        return y + along(bias, y)


class MergedDense(nn.Module):
    """y = x·kernel + b with kernel = V·diag(σ + ε)·Uᵀ merged beforehand.

    The gradient reaches ε directly, not through the kernel's (`merged_product`).
    Collections: `params` {eps [S]}, `merged` {kernel}, `factors` {u, sigma, v},
    `frozen` {bias}, the same U and V as in `SpectralDense`. If `known` {y} is given, y
    is the output that this layer computed before, and only its gradient is wanted.
    """

    features: int
    precision: Any = HIGHEST

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        size = min(x.shape[-1], self.features)
        eps = self.param("eps", ZEROS, (size,))
        u, v = factors(self, x.shape[-1], self.features)
        sigma = weight(self, "sigma", ONES, (size,), collection="factors")

        def merged() -> Array:
            return jnp.matmul(v * (sigma + eps)[None, :], u.T, precision=HIGHEST)

        kernel = self.variable("merged", "kernel", merged).value
        bias = weight(self, "bias", ZEROS, (self.features,))
        y = None
        if self.has_variable("known", "y"):
            y = jnp.asarray(self.get_variable("known", "y"))
            y = y - along(bias, y)
        y = merged_product(self.precision, x, kernel, u, sigma, v, eps, y)
        return y + along(bias, y)


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
    product with the longer side follows from what is known: y·u_i = s_i (x·v_i) if y
    is given, and dx·v_i = s_i (dy·u_i), since dx is needed anyway.

    Args:
      precision: of the products.
      x: input.
      kernel: V·diag(σ + ε)·Uᵀ.
      u: output side of the factors.
      sigma: singular values of the original kernel.
      v: input side.
      eps: their changes.
      y: x·kernel if it has been computed before.
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
    """scaled() / s, or the equal direct() if a small s would amplify rounding."""

    def divided() -> Array:
        product = scaled()
        return product / along(s, product)

    size = jnp.abs(s)
    return lax.cond(jnp.min(size) > SMALL * jnp.max(size), divided, direct)


merged_product.defvjp(_merged_product_forward, _merged_product_backward)
