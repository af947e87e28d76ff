"""A repair as a delta: ε, and the digest of the model that ε belongs to.

    base params, repaired params --extract--> Delta, Report
    base params, factors, ε of a run --from_eps--> Delta
    Delta, leaf of the base --repaired_leaf--> repaired leaf (`apply`: all leaves)

The giant's ε are 245,760 numbers: under 1 MB for a model of 4.5 GB. They belong to the
singular vectors of one base model, which are not stored: whoever applies a delta
recomputes them from the same bytes, and a probe of the change tells whether they came
out the same.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sinder_jax import factor, kernels, param_tree
from sinder_jax.param_tree import CLASS_TOKEN, MASK_TOKEN, POSITIONS, Params
from sinder_jax.vit import ViTConfig

# Rounding of a layer rebuilt from factors, relative to its norm: 2e-6 in the authors'
# recorded runs (tests/golden), up to 6e-6 with LAPACK's float32 SVDs at giant width.
ROUNDING = 1e-5
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


class Difference(NamedTuple):
    """How one tensor differs between base and repaired model.

    Attributes:
      change: ‖repaired − base‖ / ‖base‖, Frobenius norm.
      rest: ‖repaired − base with ε‖ / ‖base‖: what ε cannot express and a delta omits.
    """

    change: float
    rest: float


class Report(NamedTuple):
    """What `extract` found.

    Attributes:
      differences: for each tensor that differs, by name such as "attn/q of block 3".
    """

    differences: dict[str, Difference]

    @property
    def rounding_only(self) -> tuple[str, ...]:
        """Tensors whose whole change may be rounding; their ε is kept all the same."""
        return tuple(n for n, d in self.differences.items() if d.change < ROUNDING)

    @property
    def largest_rest(self) -> tuple[str, float]:
        """Name and rest of the tensor with the largest rest."""
        name = max(self.differences, key=lambda n: self.differences[n].rest)
        return name, self.differences[name].rest


def touched(delta: Delta) -> tuple[int, ...]:
    """Blocks whose kernels a delta rebuilds: those with a nonzero ε."""
    changed = np.any([np.any(e != 0, axis=-1) for e in delta.eps.values()], axis=0)
    return tuple(int(block) for block in np.flatnonzero(changed))


# --- From a repair to its delta -----------------------------------------------------


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
    delta = _empty(config, base_params)
    for name, values in eps.items():
        delta.eps[name][:] = np.asarray(values)
    check(delta)
    for name, stack in delta.eps.items():
        for block, e in enumerate(stack):
            u, v = (np.asarray(part[name][block]) for part in (factors.u, factors.v))
            delta.probe[name][block] = _probe(u, e, v)
    check(delta)  # factors may hold NaN
    return delta


def extract(
    config: ViTConfig,
    base_params: Params,
    repaired_params: Params,
    *,
    compare_mask_token: bool = True,
    residual: float = ROUNDING,
    before_svd: BeforeSVD | None = None,
) -> tuple[Delta, Report]:
    """The delta between two models, exact to float32 rounding.

    For every kernel that differs, s = argmin ‖W' − V·diag(s)·Uᵀ‖ and ε = s − σ, with U
    and V the float32 factors that merging uses. q, k and the biases of the same layers
    may differ by rounding, because the authors' code rebuilds whole layers; a delta
    omits that, and the part of a kernel that lies off the basis. The report lists both.
    ε is kept however small: a single number cannot be told from rounding.

    A repair made with a float32 SVD, as the authors' is, needs a larger `residual`: it
    rotates close pairs of singular vectors, so that up to 3e-3 of the change lie off
    our basis (measured at giant width).

    Args:
      config: the architecture of both models; the delta keeps its resampling.
      base_params: params before the repair.
      repaired_params: params after it.
      compare_mask_token: False if one of the two layouts has no mask token.
      residual: how much of a kernel or bias may be omitted, relative to its norm.
      before_svd: called with kernel name and block before each SVD.

    Raises:
      ValueError: the models do not differ; or they differ in a tensor that no ε changes
        (found before the first SVD), or in a kernel by more than its singular values:
        names each with its relative change. Or params that do not fit the config or are
        not finite float32 numbers.
    """
    param_tree.check(config, base_params)
    param_tree.check(config, repaired_params)
    old, new = (
        {path: np.asarray(leaf) for path, leaf in param_tree.flatten(params).items()}
        for params in (base_params, repaired_params)
    )
    differences = _differences(*(_rebuilt_parts(config, flat) for flat in (old, new)))
    fixed = (_fixed_parts(config, flat, compare_mask_token) for flat in (old, new))
    _refuse(_differences(*fixed) | _beyond(differences, residual), residual)
    delta = _empty(config, base_params)
    for block in range(config.depth):
        for name in kernels.names(config):
            pair = [kernels.view(config, flat, block, name) for flat in (old, new)]
            if pair[0].tobytes() == pair[1].tobytes():
                continue
            if before_svd is not None:
                before_svd(name, block)
            delta.eps[name][block], delta.probe[name][block], found = _fit(*pair)
            differences[_in_block(name, block)] = found
    _refuse(_beyond(differences, residual), residual)
    if not differences:
        raise ValueError("the two models do not differ: there is nothing to extract")
    check(delta)
    return delta, Report(differences)


def _empty(config: ViTConfig, base_params: Params) -> Delta:
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


Parts = Iterator[tuple[str, np.ndarray]]


def _differences(parts: Parts, new_parts: Parts) -> dict[str, Difference]:
    """Tensors without ε that differ in any bit: all of the change is rest."""
    differences = {}
    for (name, old), (_, new) in zip(parts, new_parts, strict=True):
        if old.tobytes() != new.tobytes():
            change = _relative(new, old, old)
            differences[name] = Difference(change, change)
    return differences


def _rebuilt_parts(config: ViTConfig, flat: Mapping[str, np.ndarray]) -> Parts:
    """q, k and the biases: without ε, but in layers that a repair may rebuild."""
    for block in range(config.depth):
        for name in ("attn/q", "attn/k"):
            yield _in_block(name, block), kernels.view(config, flat, block, name)
    for layer in kernels.layers(config):
        yield from _by_block(f"{layer}/bias", flat)


def _fixed_parts(
    config: ViTConfig, flat: Mapping[str, np.ndarray], with_mask_token: bool
) -> Parts:
    """The tensors of all other layers; the class token as a digest includes it."""
    yield "class token with position", flat[CLASS_TOKEN] + flat[POSITIONS][:, :1]
    yield "patch positions", flat[POSITIONS][:, 1:]
    for path in sorted(flat.keys() - {CLASS_TOKEN, POSITIONS}):
        inside = path.removeprefix("blocks/")
        if inside.rpartition("/")[0] in kernels.layers(config):
            continue
        if inside != path:
            yield from _by_block(inside, flat)
        elif path != MASK_TOKEN or with_mask_token:
            yield path, flat[path]


def _by_block(path: str, flat: Mapping[str, np.ndarray]) -> Parts:
    for block, part in enumerate(flat[f"blocks/{path}"]):
        yield _in_block(path, block), part


def _fit(
    kernel: Float[np.ndarray, "in out"], repaired: Float[np.ndarray, "in out"]
) -> tuple[np.ndarray, np.ndarray, Difference]:
    """ε and probe of one kernel, and what they omit."""
    u, sigma, v = factor.factorize_kernel(kernel)
    # Merging rounds σ + ε to float32: ε is the step to the nearest float32, so that it
    # is 0, not noise, for most singular values that a run left alone.
    eps = _nearest_values(repaired, u, v).astype(np.float32) - sigma
    merged = np.asarray(factor.merge_kernel(u, sigma + eps, v))
    difference = Difference(
        _relative(repaired, kernel, kernel), _relative(repaired, merged, kernel)
    )
    return eps, _probe(u, eps, v), difference


def _nearest_values(
    kernel: Float[np.ndarray, "in out"],
    u: Float[np.ndarray, "out S"],
    v: Float[np.ndarray, "in S"],
) -> Float[np.ndarray, " S"]:
    """The s that minimizes ‖kernel − V·diag(s)·Uᵀ‖, in float64.

    Between two of the matrices v_i·u_iᵀ the rounding of the float32 factors enters
    twice (1e-15), but their norms are 1 only to 1e-7: hence the division, without which
    s would be off by more than its own rounding.
    """
    u, v, kernel = (np.asarray(x, np.float64) for x in (u, v, kernel))
    along = np.sum((v.T @ kernel) * u.T, axis=1)
    return along / (np.sum(u * u, axis=0) * np.sum(v * v, axis=0))


def _beyond(
    differences: Mapping[str, Difference], residual: float
) -> dict[str, Difference]:
    return {name: d for name, d in differences.items() if not d.rest < residual}


def _refuse(wrong: Mapping[str, Difference], residual: float) -> None:
    """Raises if models differ in a way that no ε expresses."""
    if wrong:
        listed = [f"{name} by {d.rest:.1g}" for name, d in wrong.items()]
        more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
        raise ValueError(
            "a repair changes singular values only, but relative to the base these "
            f"tensors differ otherwise: {', '.join(listed[:10])}{more} (up to "
            f"{residual:g} is taken for rounding)"
        )


# --- From a delta to the repaired model ---------------------------------------------


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
    error = np.abs(_probe(u, eps, v) - delta.probe[name][block])
    if not np.all(error <= PROBE_TOLERANCE):
        raise ValueError(
            f"{_in_block(name, block)}: the singular vectors computed here are not "
            "those of its ε; another linear algebra library rotates those of equal "
            "singular values: apply the delta where it was made, and copy the model"
        )
    # Exact in float64, then rounded: at scale 1 the float32 sum of σ and ε.
    s = (sigma.astype(np.float64) + scale * eps.astype(np.float64)).astype(np.float32)
    return np.asarray(factor.merge_kernel(u, s, v))


def _probe(
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


# --- Checks ---------------------------------------------------------------------------


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


def _in_block(name: str, block: int) -> str:
    return f"{name} of block {block}"


def _relative(a: np.ndarray, b: np.ndarray, base: np.ndarray) -> float:
    """‖a − b‖ / ‖base‖; where the base is zero, ‖a − b‖ / ‖a‖."""
    a, b, base = (np.asarray(x, np.float64) for x in (a, b, base))
    distance = np.linalg.norm(a - b)
    norm = np.linalg.norm(base) or np.linalg.norm(a)
    return float(distance / norm) if distance else 0.0  # -0.0 differs from 0.0 in bits
