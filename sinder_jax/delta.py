"""What a repair changed, as a delta: ε, and the digest of the model it belongs to.

    base params, factors, ε of a run --from_eps--> Delta
    Delta, leaf of the base --repaired_leaf--> repaired leaf (`apply`: all leaves)

The giant's ε are 245,760 numbers: under 1 MB for a model of 4.5 GB. They belong to the
singular vectors of one base model, which are not stored: whoever applies a delta
recomputes them from the same bytes, and a probe of the change tells whether they came
out the same. `difference` makes the delta between two models.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sinder_jax import factor, kernels, param_tree
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

NUM_PROBES = 4
# Relative to the change: two float64 SVDs of LAPACK agree to 1e-9, a float32 SVD is off
# by 1e-5 to 5e-4, and one that rotated equal singular values by 1.
PROBE_TOLERANCE = 1e-5
BeforeSVD = Callable[[str, int], None]  # kernel name, block


class Delta(NamedTuple):
    """What a repair changes, and the model it changes.

    Attributes:
      config: the architecture of base and repaired model.
      eps: ε by `kernels.names`, float32 [L, S], in units of singular values.
      base: `param_tree.digest` of the base, the same in every layout.
      probe: by the same names, float32 [L, NUM_PROBES]: aᵀ·ΔW·b/‖ε‖ for fixed random
        vectors a and b, of order 1, with ΔW = V·diag(ε)·Uᵀ; 0 where ε is 0.
    """

    config: ViTConfig
    eps: dict[str, Float[np.ndarray, "L S"]]
    base: str
    probe: dict[str, Float[np.ndarray, "L probes"]]


def touched(delta: Delta) -> tuple[int, ...]:
    """Blocks whose kernels a delta rebuilds: those with a nonzero ε."""
    changed = np.any([np.any(e != 0, axis=-1) for e in delta.eps.values()], axis=0)
    return tuple(int(block) for block in np.flatnonzero(changed))


def from_eps(
    config: ViTConfig,
    base_params: Params,
    factors: factor.Factors,
    eps: Mapping[str, Any],
) -> Delta:
    """The delta of a run, whose ε is known exactly.

    Args:
      config: the architecture.
      base_params: the model that was repaired.
      factors: the factors of `base_params` that the run used.
      eps: a dict like `factors.sigma`.

    Raises:
      ValueError: params, factors or ε do not fit the config or each other, are not
        finite, or ε is all zero.
    """
    param_tree.check(config, base_params)
    factor.check_factors(kernels.split(config, base_params)[1], factors)
    factor.check_eps(factors, eps)
    delta = empty(config, base_params)
    for name, values in eps.items():
        delta.eps[name][:] = np.asarray(values)
    check(delta)
    for name, stack in delta.eps.items():
        for block, e in enumerate(stack):
            u, v = (np.asarray(part[name][block]) for part in (factors.u, factors.v))
            delta.probe[name][block] = probe_of(u, e, v)
    check(delta)  # factors may hold NaN
    return delta


def empty(config: ViTConfig, base_params: Params) -> Delta:
    """A delta of these params whose ε and probes are all zero, to be filled in."""
    eps = {n: np.zeros(shape, np.float32) for n, shape in _eps_shapes(config).items()}
    probe = {n: np.zeros((len(e), NUM_PROBES), np.float32) for n, e in eps.items()}
    return Delta(config, eps, param_tree.digest(base_params), probe)


def _eps_shapes(config: ViTConfig) -> dict[str, tuple[int, int]]:
    """[L, S] of every trainable kernel, S being the shorter of its sides."""
    depth, width, hidden = config.depth, config.embed_dim, config.hidden_dim
    up = 2 * hidden if config.ffn_layer == "swiglu" else hidden
    sizes = (width, width, min(width, up), min(width, hidden))
    return {
        name: (depth, size)
        for name, size in zip(kernels.names(config), sizes, strict=True)
    }


def check_base(delta: Delta, digest: str) -> None:
    """Refuses any model but the base of a delta.

    Args:
      delta: the delta.
      digest: `param_tree.digest` of the model.

    Raises:
      ValueError: the digest is not that of the base.
    """
    if delta.base != digest:
        raise ValueError(
            f"the delta belongs to the model with digest {delta.base[:12]}…, this "
            f"model has {digest[:12]}…: a delta fits only the very weights it was made "
            "for"
        )


def repaired_leaf(
    delta: Delta,
    path: str,
    leaf: Any,
    scale: float = 1.0,
    before_svd: BeforeSVD | None = None,
) -> np.ndarray:
    """One leaf of the base's params, repaired: the model need not fit in memory.

    Args:
      delta: the delta; the caller has checked the whole model with `check_base`.
      path: flat name of the leaf, such as "blocks/attn/qkv/kernel".
      leaf: float32, stacked over blocks if it belongs to one.
      scale: the share of ε to apply, above 0 and at most 1.
      before_svd: called with kernel name and block before each SVD.

    Returns:
      V·diag(float32(σ + scale·ε))·Uᵀ for the trainable kernels of touched blocks; q, k
      and every other leaf bit for bit.

    Raises:
      ValueError: a scale out of range, a leaf that does not belong to this model, or
        singular vectors other than those ε belongs to.
    """
    check_scale(scale)
    leaf, config = np.asarray(leaf), delta.config
    want = param_tree.leaf_shapes(config).get(path, "no such leaf")
    if leaf.shape != want or leaf.dtype != np.float32:
        raise ValueError(
            f"{path} is {leaf.dtype} {leaf.shape}; in this model it is float32 {want}"
        )
    names = [n for n in kernels.names(config) if kernels.place(config, n).path == path]
    if not names:
        return leaf
    repaired = np.array(leaf)
    for block in touched(delta):
        if before_svd is not None:
            before_svd(names[0], block)
        kernel = kernels.view(config, {path: repaired}, block, names[0])
        kernel[:] = _repaired_kernel(delta, names[0], block, kernel, scale)
    return repaired


def apply(
    base_params: Params,
    delta: Delta,
    scale: float = 1.0,
    before_svd: BeforeSVD | None = None,
) -> dict[str, Any]:
    """The repaired model: `repaired_leaf` of every leaf of the base.

    Args:
      base_params: the params that the delta belongs to; not changed.
      delta: the delta.
      scale: the share of ε to apply, above 0 and at most 1.
      before_svd: called with kernel name and block before each SVD.

    Returns:
      A params tree of host arrays; at scale 1 it has the bits that `factor.merge` gives
      for the same ε on the same machine.

    Raises:
      ValueError: another base, a scale out of range, or singular vectors other than
        those ε belongs to.
    """
    check_scale(scale)
    flat = param_tree.flatten(base_params)
    check_base(delta, param_tree.digest(flat))
    for path, leaf in flat.items():
        flat[path] = repaired_leaf(delta, path, leaf, scale, before_svd)
    return param_tree.unflatten(flat)


def _repaired_kernel(
    delta: Delta,
    name: str,
    block: int,
    kernel: Float[np.ndarray, "in out"],
    scale: float,
) -> np.ndarray:
    u, sigma, v = factor.factorize_kernel(kernel)
    eps = delta.eps[name][block]
    error = np.abs(probe_of(u, eps, v) - delta.probe[name][block])
    if not np.all(error <= PROBE_TOLERANCE):
        raise ValueError(
            f"{kernels.in_block(name, block)}: the singular vectors computed here are "
            "not those of its ε; another linear algebra library rotates those of equal "
            "singular values: apply the delta where it was made, and copy the model"
        )
    # Exact in float64, then rounded: at scale 1 the float32 sum of σ and ε.
    s = (sigma.astype(np.float64) + scale * eps.astype(np.float64)).astype(np.float32)
    return np.asarray(factor.merge_kernel(u, s, v))


def probe_of(
    u: Float[np.ndarray, "out S"],
    eps: Float[np.ndarray, " S"],
    v: Float[np.ndarray, "in S"],
) -> Float[np.ndarray, " probes"]:
    """aᵀ·V·diag(ε/‖ε‖)·Uᵀ·b for fixed Gaussian a and b, in float64.

    The mean square over a and b is 1, and that of an error E of the change is
    ‖E‖²/‖ε‖²: a rotated basis shows at once, whatever the scale and however small ε is
    compared with W.
    """
    norm = np.linalg.norm(eps.astype(np.float64))
    if norm == 0:
        return np.zeros(NUM_PROBES)
    # NumPy promises that RandomState draws the same numbers forever.
    a, b = (
        np.random.RandomState(seed).standard_normal((NUM_PROBES, len(side)))
        for seed, side in enumerate((v, u))
    )
    return ((a @ v) * (b @ u)) @ (eps / norm)


def check_scale(scale: float) -> None:
    """Raises ValueError unless `scale` is a share of the change that can be applied."""
    if not 0 < scale <= 1:
        raise ValueError(
            f"got scale {scale:g}, expected above 0 and at most 1, the whole repair; "
            "to undo a repair, use the base file"
        )


def check(delta: Delta) -> None:
    """Raises ValueError unless all parts of a delta fit its config and are finite."""
    shapes = _eps_shapes(delta.config)
    probes = {name: (depth, NUM_PROBES) for name, (depth, _) in shapes.items()}
    for part, want in (("eps", shapes), ("probe", probes)):
        arrays = getattr(delta, part)
        got = {name: np.shape(array) for name, array in arrays.items()}
        if got != want:
            raise ValueError(f"{part} must hold {want} for this model, got {got}")
        for name, array in arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"{part} of {name} must be finite float32 numbers")
    if not re.fullmatch("[0-9a-f]{64}", delta.base):
        raise ValueError(f"the base's digest must be a SHA-256, got {delta.base!r}")
    if not touched(delta):
        raise ValueError("ε is zero throughout: there is nothing to repair")
