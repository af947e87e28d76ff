"""Clamping: no singular value of a kernel is left above γ (appendix B of the paper).

    params --clamp_singular_values--> params with W = U·min(S, γ)·Vᵀ
    params, several γ --clamp_all--> the params of each γ, one factorization for all

NumPy float64 on the host, one matrix per core; on any params, of NumPy or JAX arrays.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sinder_jax import kernels, linalg, param_tree
from sinder_jax.linalg import Progress, by_kernel
from sinder_jax.loss import check_option
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig


def clamp_singular_values(
    config: ViTConfig,
    params: Params,
    gamma: float,
    *,
    kernels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Params whose kernels are W = U·min(S, γ)·Vᵀ in every block (appendix B, fig. 5).

    Args:
      config: the architecture.
      params: the params tree; it is not changed.
      gamma: γ, the largest singular value that is left; above 0.
      kernels: names of `kernels.layers`, or "attn/q", "attn/k", "attn/v"; None: all
        linear layers of the blocks, the fused qkv as the one matrix it is in the model.
      progress: called after each kernel.

    Returns:
      A params tree. Whatever is not clamped, and a kernel none of whose singular values
      is above γ, keeps its bits.

    Raises:
      ValueError: γ is not above 0, or a kernel that does not exist or is named twice.

    Example:
      >>> from sinder_jax import planted
      >>> from sinder_jax.analysis.spectra import kernel_spectra
      >>> made = planted.planted_model(0)
      >>> clamped = clamp_singular_values(made.config, made.params, 1.5)
      >>> float(kernel_spectra(made.config, clamped)["mlp/w3"].max().round(5))
      1.5
    """
    ((_, clamped),) = clamp_all(
        config, params, [gamma], kernels=kernels, progress=progress
    )
    return clamped


def clamp_all(
    config: ViTConfig,
    params: Params,
    gammas: Iterable[float],
    *,
    kernels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[float, dict[str, Any]]]:
    """`clamp_singular_values` for several γ, with each kernel factorized only once.

    Between the steps it keeps the singular vectors of the shorter side that belong to
    values above the smallest γ (3 GB for the giant if all do), but no clamped model:
    drop the one you have before you ask for the next.

    Args:
      config: the architecture.
      params: the params tree; it is not changed.
      gammas: any number of γ, in any order; each above 0.
      kernels: as for `clamp_singular_values`.
      progress: called after each kernel is factorized.

    Returns:
      An iterator of (γ, params), in the order of `gammas`.

    Raises:
      ValueError: as for `clamp_singular_values`, at once and not at the first step.
    """
    gammas, names = tuple(gammas), _clamped_names(config, kernels)
    for gamma in gammas:
        check_option("gamma", gamma, gamma > 0, "above 0")

    def clamped() -> Iterator[tuple[float, dict[str, Any]]]:
        above = functools.partial(_above, config, params, min(gammas, default=0))
        found = dict(by_kernel(above, names, config.depth, progress)) if gammas else {}
        for gamma in gammas:
            yield gamma, _clamped(config, params, found, gamma)

    return clamped()


Above = tuple[np.ndarray, np.ndarray]
"""The singular values of a kernel above a γ, and their short side's vectors."""


def _above(
    config: ViTConfig, params: Params, gamma: float, name: str, block: int
) -> Above:
    wide = linalg.wide(kernels.matrix(config, params, block, name))
    vectors, s = linalg.short_side(wide, subset_by_value=(gamma**2, np.inf))
    return s, np.ascontiguousarray(vectors)


def _clamped(
    config: ViTConfig, params: Params, found: dict[str, list[Above]], gamma: float
) -> dict[str, Any]:
    """Takes σ − γ off every triplet above γ, so that the others keep their rounding.

    With vectors u of the shorter side alone: W − Σ u·(1 − γ/σ)·uᵀW.
    """
    flat = param_tree.flatten(params)
    for path in {kernels.place(config, name).path for name in found}:
        flat[path] = np.array(flat[path])

    def clamp(name: str, block: int) -> None:
        s, vectors = found[name][block]
        too_large = s > gamma
        if too_large.any():
            wide = linalg.wide(kernels.view(config, flat, block, name).T)
            u, shrink = vectors[:, too_large], 1 - gamma / s[too_large]
            wide[...] = wide - (u * shrink[None, :]) @ (u.T @ wide.astype(np.float64))

    for _ in by_kernel(clamp, list(found), config.depth):
        pass  # each changes its part of `flat`
    return param_tree.unflatten(flat)


def _clamped_names(config: ViTConfig, wanted: Sequence[str] | None) -> tuple[str, ...]:
    names = kernels.layers(config) if wanted is None else tuple(wanted)
    for name in names:
        kernels.place(config, name)
    fused_and_third = kernels.FUSED in names and set(names) & set(kernels.THIRDS)
    if len(set(names)) < len(names) or fused_and_third:
        raise ValueError(f"a kernel is named twice in {', '.join(names)}")
    return names
