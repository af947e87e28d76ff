"""Kernels as U·diag(σ + ε)·Vᵀ, of which only ε is trained.

    params --factorize--> U, σ, V (float64 on the host, stored as float32)
    U, σ + ε, V --merge_kernel--> kernel [in, out]   the one way a kernel is rebuilt

Trainable are the value third of the fused qkv, the attention projection and the two
FFN kernels. A kernel is Flax's [in, out]; the paper's W multiplies a column and is
[out, in]: `u` is the output side, `v` the input side and kernel = V·diag(s)·Uᵀ.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from sinder_jax import kernels, linalg, param_tree
from sinder_jax.layers import SpectralDense as SpectralDense  # DESIGN's contract
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

HIGHEST = jax.lax.Precision.HIGHEST
ORTHONORMAL = 1e-9


@struct.dataclass
class Factors:
    """U, σ and V of every trainable kernel, stacked over blocks; float32.

    Each is a dict over `kernels.names`: u [L, out, S], sigma [L, S] descending,
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
    with linalg.one_thread():  # so that whoever factorizes gets the same basis
        v, sigma, ut = _by_gram_matrix(kernel) or np.linalg.svd(kernel, False)
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
    wide = linalg.wide(kernel)
    short, sigma = linalg.short_side(wide, driver="evd")
    if not sigma[-1] > 0:
        return None
    long = short.T @ wide / sigma[:, None]  # one vector a row
    if np.abs(long @ long.T - np.eye(len(sigma))).max() > ORTHONORMAL:
        return None
    return (short, sigma, long) if width_in < width_out else (long.T, sigma, short.T)


def factorize(config: ViTConfig, params: Params) -> Factors:
    """Factors of every trainable kernel, by `factorize_kernel`.

    Args:
      config: the architecture.
      params: the params tree; float32 kernels [L, in, out].

    Returns:
      `Factors` of NumPy float32 arrays with S = min(in, out).
    """
    _, stacks = kernels.split(config, params)
    factors = Factors(u={}, sigma={}, v={})

    def of_block(name: str, block: int) -> KernelFactors:
        return factorize_kernel(np.asarray(stacks[name][block]))

    by_kernel = linalg.by_kernel(of_block, list(stacks), config.depth)
    with contextlib.closing(by_kernel):  # an interrupt drops the jobs that wait
        for name, found in by_kernel:
            parts = (np.stack(part) for part in zip(*found, strict=True))
            factors.u[name], factors.sigma[name], factors.v[name] = parts
    return factors


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


def merge_in_place(
    stacks: Mapping[str, np.ndarray], factors: Factors, eps: Mapping[str, Any]
) -> None:
    """Folds ε into kernels; a block whose ε is all zero is not touched.

    Args:
      stacks: the original trainable kernels [L, in, out] by name; changed.
      factors: their factors.
      eps: changes of the singular values, a dict like `factors.sigma`.
    """
    host = {name: np.asarray(e) for name, e in eps.items()}
    changed = np.any([np.any(e != 0, axis=-1) for e in host.values()], axis=0)
    for name, stack in stacks.items():
        for block in np.flatnonzero(changed):
            # From the host to the default device, wherever the factors are kept.
            u, sigma, v = (
                np.asarray(part[name][block])
                for part in (factors.u, factors.sigma, factors.v)
            )
            stack[block] = merge_kernel(u, sigma + host[name][block], v)


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
    flat = {path: np.asarray(x) for path, x in param_tree.flatten(params).items()}
    places = {name: kernels.PLACES[name] for name in factors.sigma}
    flat |= {place.path: np.array(flat[place.path]) for place in places.values()}
    stacks = {name: place.of(flat[place.path]) for name, place in places.items()}
    merge_in_place(stacks, factors, eps)
    return param_tree.unflatten(flat)


def check_factors(stacks: Mapping[str, Any], factors: Factors) -> None:
    """Raises ValueError unless `factors` fit the kernels [L, in, out] of `stacks`."""
    for name, kernel in stacks.items():
        depth, width_in, width_out = kernel.shape
        size = min(width_in, width_out)
        want = [(depth, width_out, size), (depth, size), (depth, width_in, size)]
        parts = (factors.u, factors.sigma, factors.v)
        got = [tuple(np.shape(part.get(name, ()))) for part in parts]
        if got != want:
            raise ValueError(f"factors u, sigma, v of {name} must be {want}, got {got}")


def check_eps(factors: Factors, eps: Mapping[str, Any]) -> None:
    """Raises ValueError unless `eps` has the names and shapes of `factors.sigma`."""
    want = {name: tuple(np.shape(x)) for name, x in factors.sigma.items()}
    got = {name: tuple(np.shape(x)) for name, x in eps.items()}
    if got != want:
        raise ValueError(f"eps must hold {want} like the singular values; got {got}")


def spectral_variables(
    config: ViTConfig, params: Params, factors: Factors, eps: Mapping[str, Any]
) -> dict[str, Any]:
    """The variables of `vit.ViT(config, spectral=True)` from params and ε.

    Returns:
      {"params": only s = σ + ε, "factors": U and V, "frozen": all the rest}, to be
      given to `model.apply`; `jax.grad` by "params" is the gradient by ε.
    """
    check_eps(factors, eps)
    frozen, _ = kernels.split(config, params)
    s = {name: factors.sigma[name] + eps[name] for name in eps}
    return {
        "params": {"blocks": kernels.nest(s=s)},
        "factors": {"blocks": kernels.nest(u=factors.u, v=factors.v)},
        "frozen": frozen,
    }
