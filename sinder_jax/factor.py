"""Kernels as U·diag(σ + ε)·Vᵀ, of which only ε is trained.

    params --factorize--> U, σ, V (float64 on the host, stored as float32)
    U, σ + ε, V --merge_kernel--> kernel [in, out]   the one way a kernel is rebuilt
    kernel --largest_singular_value--> σ_0, without an SVD

Trainable are the value third of the fused qkv, the attention projection and the two
FFN kernels. A kernel is Flax's [in, out]; the paper's W multiplies a column and is
[out, in]: `u` is the output side, `v` the input side and kernel = V·diag(s)·Uᵀ.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import struct, traverse_util
from jax import lax
from jaxtyping import Array, Float

from sinder_jax.cores import in_parallel

Params = Mapping[str, Any]
HIGHEST = jax.lax.Precision.HIGHEST
# Of the largest singular value: dividing by a smaller one would make float32's rounding
# of 1e-7 more than the 1e-4 by which ε-gradients may be off.
SMALL = 1e-3
ORTHONORMAL = 1e-9


@runtime_checkable
class HasFFNLayer(Protocol):
    """What is needed of a `vit.ViTConfig` here: which FFN the blocks have."""

    @property
    def ffn_layer(self) -> str: ...


def kernel_names(config: HasFFNLayer) -> tuple[str, str, str, str]:
    """Names of the trainable kernels of a block, as paths below `blocks`."""
    if config.ffn_layer == "swiglu":
        return ("attn/v", "attn/proj", "mlp/w12", "mlp/w3")
    return ("attn/v", "attn/proj", "mlp/fc1", "mlp/fc2")


# --- Between a params tree and its trainable kernels --------------------------------


def split_params(
    config: HasFFNLayer, params: Params
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts `params` into what stays frozen and the trainable kernels.

    Returns:
      (frozen, kernels). `frozen` is a tree like `params` without the trainable kernels;
      its blocks/attn holds `qk` {kernel [L, D, 2D], bias [L, 2D]} and `v` {bias [L, D]}
      in place of `qkv`. `kernels` maps each of `kernel_names` to [L, in, out].
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    kernel, bias = (flat.pop(f"blocks/attn/qkv/{leaf}") for leaf in ("kernel", "bias"))
    width = kernel.shape[1]
    flat["blocks/attn/qk/kernel"] = kernel[:, :, : 2 * width]
    flat["blocks/attn/qk/bias"] = bias[:, : 2 * width]
    flat["blocks/attn/v/kernel"] = kernel[:, :, 2 * width :]
    flat["blocks/attn/v/bias"] = bias[:, 2 * width :]
    kernels = {name: flat.pop(f"blocks/{name}/kernel") for name in kernel_names(config)}
    return traverse_util.unflatten_dict(flat, sep="/"), kernels


def join_params(frozen: Params, kernels: Mapping[str, Any]) -> dict[str, Any]:
    """The params tree back from `split_params`, bit for bit, as host arrays."""
    flat = traverse_util.flatten_dict(dict(frozen), sep="/")
    flat |= {f"blocks/{name}/kernel": kernel for name, kernel in kernels.items()}
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    for leaf in ("kernel", "bias"):
        parts = (flat.pop(f"blocks/attn/{part}/{leaf}") for part in ("qk", "v"))
        flat[f"blocks/attn/qkv/{leaf}"] = np.concatenate(tuple(parts), axis=-1)
    return traverse_util.unflatten_dict(flat, sep="/")


# --- Factorizing and merging --------------------------------------------------------


@struct.dataclass
class Factors:
    """U, σ and V of every trainable kernel, stacked over blocks; float32.

    Each is a dict over `kernel_names`: u [L, out, S], sigma [L, S] descending,
    v [L, in, S]. ε belongs to this very basis: singular vectors of close singular
    values turn from one SVD to the next, so factors are computed once and stored.
    """

    u: dict[str, Any]
    sigma: dict[str, Any]
    v: dict[str, Any]


class KernelFactors(NamedTuple):
    """U, σ and V of one kernel, float32: kernel = V·diag(σ)·Uᵀ."""

    u: Float[np.ndarray, "out S"]
    sigma: Float[np.ndarray, " S"]
    v: Float[np.ndarray, "in S"]


def factorize_kernel(kernel: Float[np.ndarray, "in out"]) -> KernelFactors:
    """Factors of one kernel in float64 on the host.

    float32 SVDs of two libraries turn close pairs differently, which moves a merged
    kernel by 3e-6 to 3e-5 of its norm; float64 keeps that below float32 rounding.

    A kernel with a shorter side goes through the eigenvectors of that side's Gram
    matrix, two to three times as fast as an SVD. The vectors of the longer side then
    lose accuracy as (σ_0/σ_i)², so they are checked to be orthonormal to 1e-9, below
    the rounding of storage; a kernel that fails, and a square one, whose smallest
    σ is often far below the largest, gets the SVD.

    Args:
      kernel: any floating-point format.

    Returns:
      U, σ (descending) and V, each number rounded once to float32; S = min(in, out).
    """
    kernel = np.asarray(kernel, np.float64)
    v, sigma, ut = _by_gram_matrix(kernel) or np.linalg.svd(kernel, full_matrices=False)
    return KernelFactors(
        *(np.array(x, np.float32, order="C") for x in (ut.T, sigma, v))
    )


def _by_gram_matrix(
    kernel: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """V, σ and Uᵀ of a float64 kernel [in, out], or None if they are not accurate."""
    width_in, width_out = kernel.shape
    if width_in == width_out:
        return None
    wide = kernel if width_in < width_out else kernel.T
    squares, short = scipy.linalg.eigh(wide @ wide.T, driver="evd")
    squares, short = squares[::-1], short[:, ::-1]
    if not squares[-1] > 0:
        return None
    sigma = np.sqrt(squares)
    long = short.T @ wide / sigma[:, None]  # one vector a row
    if np.abs(long @ long.T - np.eye(len(sigma))).max() > ORTHONORMAL:
        return None
    if width_in < width_out:
        return short, sigma, long
    return long.T, sigma, short.T


def factorize(config: HasFFNLayer, params: Params) -> Factors:
    """Factors of every trainable kernel, by `factorize_kernel`.

    One kernel a core at a time (`cores.in_parallel`).

    Args:
      config: the model's configuration.
      params: the params tree; float32 kernels [L, in, out].

    Returns:
      `Factors` of NumPy float32 arrays with S = min(in, out).
    """
    _, kernels = split_params(config, params)
    factors = Factors(u={}, sigma={}, v={})
    for name, stack in kernels.items():
        depth, width_in, width_out = stack.shape
        size = min(width_in, width_out)
        factors.u[name] = np.empty((depth, width_out, size), np.float32)
        factors.sigma[name] = np.empty((depth, size), np.float32)
        factors.v[name] = np.empty((depth, width_in, size), np.float32)

    def factorize_one(key: tuple[str, int]) -> None:
        name, block = key
        found = factorize_kernel(np.asarray(kernels[name][block]))
        factors.u[name][block] = found.u
        factors.sigma[name][block] = found.sigma
        factors.v[name][block] = found.v

    keys = [(name, block) for name in kernels for block in range(len(kernels[name]))]
    for _ in in_parallel(factorize_one, keys):
        pass
    return factors


def largest_singular_value(kernel: Float[np.ndarray, "in out"]) -> float:
    """σ_0 of a kernel, in float64: how far it can stretch a token.

    The square root of the largest eigenvalue of the kernel's Gram matrix: the largest
    one keeps float64's relative precision (small ones would lose half their digits).
    Ten times faster than an SVD, and unlike an iteration it minds neither close pairs
    nor one column nor a missing rank; a zero kernel gives 0.
    """
    short_side_first = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
    a = np.asarray(short_side_first, np.float64)
    last = len(a) - 1
    top = scipy.linalg.eigh(a @ a.T, eigvals_only=True, subset_by_index=[last, last])
    return float(np.sqrt(max(top[0], 0.0)))  # rounding may turn a 0 negative


@jax.jit
def merge_kernel(
    u: Float[Array, "out S"], s: Float[Array, " S"], v: Float[Array, "in S"]
) -> Float[Array, "in out"]:
    """V·diag(s)·Uᵀ with s = σ + ε: the one function that rebuilds a kernel.

    The step, `merge`, resume and export all call it block by block, so that a kernel
    has the same bits wherever it comes from. The barriers keep XLA from compiling it
    differently when it is part of a larger program.
    """
    u, s, v = lax.optimization_barrier((u, s, v))
    kernel = jnp.matmul(v * s[None, :], u.T, precision=HIGHEST)
    return lax.optimization_barrier(kernel)


def merge_kernels(
    kernels: Mapping[str, Any], factors: Factors, eps: Mapping[str, Any]
) -> dict[str, Any]:
    """Kernels [L, in, out] with ε folded in; a block whose ε is all zero is untouched.

    Args:
      kernels: the original trainable kernels, from `split_params`.
      factors: their factors.
      eps: changes of the singular values, a dict like `factors.sigma`.
    """
    host = {name: np.asarray(e) for name, e in eps.items()}
    changed = np.any([np.any(e != 0, axis=-1) for e in host.values()], axis=0)
    merged = {}
    for name, stack in kernels.items():
        merged[name] = np.array(stack)
        for block in np.flatnonzero(changed):
            # From the host to the default device, wherever the factors are kept.
            u, sigma, v = (
                np.asarray(part[name][block])
                for part in (factors.u, factors.sigma, factors.v)
            )
            merged[name][block] = merge_kernel(u, sigma + host[name][block], v)
    return merged


def merge(params: Params, factors: Factors, eps: Mapping[str, Any]) -> dict[str, Any]:
    """The params tree with ε folded into its kernels: W = U·diag(σ + ε)·Vᵀ.

    Args:
      params: the original params; kernels of blocks whose ε is all zero, and everything
        that is not trainable, keep their bits.
      factors: `factorize(config, params)`.
      eps: a dict like `factors.sigma`, arrays [L, S] in units of singular values.

    Returns:
      A params tree of host arrays, float32.

    Raises:
      ValueError: `eps` has other names or shapes than `factors.sigma`.
    """
    check_eps(factors, eps)
    ffn_layer = "swiglu" if "mlp/w12" in factors.sigma else "mlp"
    frozen, kernels = split_params(_FFNLayer(ffn_layer), params)
    return join_params(frozen, merge_kernels(kernels, factors, eps))


@struct.dataclass
class _FFNLayer:
    ffn_layer: str


def check_factors(kernels: Mapping[str, Any], factors: Factors) -> None:
    """Raises ValueError unless `factors` have the shapes to be those of `kernels`."""
    for name, kernel in kernels.items():
        depth, width_in, width_out = kernel.shape
        size = min(width_in, width_out)
        want = [(depth, width_out, size), (depth, size), (depth, width_in, size)]
        parts = (factors.u, factors.sigma, factors.v)
        got = [tuple(np.shape(part.get(name, ()))) for part in parts]
        if got != want:
            raise ValueError(
                f"factors u, sigma, v of {name} must be {want}, got {got}."
            )


def check_eps(factors: Factors, eps: Mapping[str, Any]) -> None:
    """Raises ValueError unless `eps` has the names and shapes of `factors.sigma`."""
    want = {name: tuple(np.shape(x)) for name, x in factors.sigma.items()}
    got = {name: tuple(np.shape(x)) for name, x in eps.items()}
    if got != want:
        raise ValueError(f"eps must hold {want} like the singular values; got {got}.")


# --- Layers that hold a factored kernel ---------------------------------------------


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
        kernel = self.variable("merged", "kernel", lambda: merge_kernel(u, eps + 1, v))
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


def spectral_variables(
    config: HasFFNLayer, params: Params, factors: Factors, eps: Mapping[str, Any]
) -> dict[str, Any]:
    """The variables of `vit.ViT(config, spectral=True)` from params and ε.

    Returns:
      {"params": only s = σ + ε, "factors": U and V, "frozen": all the rest}, to be
      given to `model.apply`; `jax.grad` by "params" is the gradient by ε.
    """
    check_eps(factors, eps)
    frozen, _ = split_params(config, params)
    s = {f"blocks/{name}/s": factors.sigma[name] + eps[name] for name in eps}
    uv = {f"blocks/{name}/u": u for name, u in factors.u.items()}
    uv |= {f"blocks/{name}/v": v for name, v in factors.v.items()}
    return {
        "params": traverse_util.unflatten_dict(s, sep="/"),
        "factors": traverse_util.unflatten_dict(uv, sep="/"),
        "frozen": frozen,
    }


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
