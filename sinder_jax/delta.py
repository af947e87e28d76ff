"""A repair as all that it changed: ε, and the digest of the model ε belongs to.

    base params, repaired params --extract--> Patch, Report
    base params, factors, ε of a run --from_eps--> Patch
    Patch, leaf of the base --patched_leaf--> leaf repaired; `apply` does all leaves

The giant's ε are 245,760 numbers, under 1 MB beside a model of 4.5 GB. They belong to
the singular vectors of one base, which are not stored: whoever applies a patch computes
them again from the same bytes, and a probe of the change tells whether they came out
the same.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sinder_jax import factor, kernels, param_tree
from sinder_jax import model as models
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

# Rounding of a layer rebuilt from factors, relative to its norm: 2e-6 in the authors'
# recorded runs (tests/golden), up to 6e-6 by LAPACK's float32 SVDs at giant width.
ROUNDING = 1e-5
NUM_PROBES = 4
# Relative to the change: two float64 SVDs of LAPACK agree to 1e-9, a float32 one is off
# by 1e-5 to 5e-4, and one that turned equal singular values by 1.
PROBE_TOLERANCE = 1e-5
MASK_TOKEN, POSITIONS, CLASS_TOKEN = "mask_token", "pos_embed", "cls_token"
Progress = Callable[[str, int], None]


class Patch(NamedTuple):
    """What a repair changes, and the model it changes.

    Attributes:
      config: the architecture of base and repaired model.
      eps: ε by `kernels.names`, float32 [L, S], in units of singular values.
      base: `param_tree.digest` of the base, the same in every layout.
      probe: by the same names, float32 [L, NUM_PROBES]: aᵀ·ΔW·b/‖ε‖ for fixed random
        vectors a and b, of order 1, with ΔW = V·diag(ε)·Uᵀ; 0 where ε is.
    """

    config: ViTConfig
    eps: dict[str, Float[np.ndarray, "L S"]]
    base: str
    probe: dict[str, Float[np.ndarray, "L probes"]]


class Difference(NamedTuple):
    """How one tensor differs between base and repaired model.

    Attributes:
      change: ‖repaired − base‖ / ‖base‖, Frobenius.
      rest: ‖repaired − patched‖ / ‖base‖: what ε does not say and a patch leaves out.
    """

    change: float
    rest: float


class Report(NamedTuple):
    """What `extract` found.

    Attributes:
      touched: the blocks that the patch changes.
      differences: by tensor, as "attn/q of block 3", for each one that differs.
    """

    touched: tuple[int, ...]
    differences: dict[str, Difference]

    @property
    def rounding_only(self) -> tuple[str, ...]:
        """Tensors whose whole change may be rounding; ε is kept all the same."""
        return tuple(n for n, d in self.differences.items() if d.change < ROUNDING)

    @property
    def largest_rest(self) -> tuple[str, float]:
        """The tensor with the largest rest, and that rest."""
        name = max(self.differences, key=lambda n: self.differences[n].rest)
        return name, self.differences[name].rest


def touched(patch: Patch) -> tuple[int, ...]:
    """Blocks whose kernels a patch rebuilds: those with an ε that is not zero."""
    changed = np.any([np.any(e != 0, axis=-1) for e in patch.eps.values()], axis=0)
    return tuple(int(block) for block in np.flatnonzero(changed))


# --- From a repair to its patch -----------------------------------------------------


def from_eps(
    config: ViTConfig,
    base_params: Params,
    factors: factor.Factors,
    eps: Mapping[str, Any],
) -> Patch:
    """The patch of a run, which knows its ε to the bit.

    Args:
      config: the architecture.
      base_params: the model that was repaired.
      factors: the factors of `base_params` that the run used.
      eps: a dict like `factors.sigma`.

    Raises:
      ValueError: params, factors or ε do not fit the config or each other, hold values
        that are not finite, or ε is all zero.
    """
    param_tree.check(config, base_params)
    factor.check_factors(kernels.split(config, base_params)[1], factors)
    factor.check_eps(factors, eps)
    patch = _empty(config, base_params)
    for name, values in eps.items():
        patch.eps[name][:] = np.asarray(values)
    check(patch)
    for name, stack in patch.eps.items():
        for block, e in enumerate(stack):
            u, v = (np.asarray(part[name][block]) for part in (factors.u, factors.v))
            patch.probe[name][block] = _probe(u, e, v)
    check(patch)  # factors may hold NaN
    return patch


def extract(
    config: ViTConfig,
    base_params: Params,
    repaired_params: Params,
    *,
    repaired_config: ViTConfig | None = None,
    compare_mask_token: bool = True,
    residual: float = ROUNDING,
    progress: Progress | None = None,
) -> tuple[Patch, Report]:
    """The patch that makes `repaired_params` of `base_params`, to float32 rounding.

    For every kernel that differs, s = argmin ‖W' − V·diag(s)·Uᵀ‖ and ε = s − σ, with U
    and V the float32 factors that merging uses. q, k and the biases beside the kernels
    may differ by rounding, since the authors' code rebuilds whole layers; that is left
    out, and so is what of a kernel lies off the basis. The report tells both. ε is kept
    however small: one number alone cannot be told from rounding.

    A repair made on a float32 SVD, as the authors' is, needs a larger `residual`: it
    turns close pairs of singular vectors, so that up to 3e-3 of the change lie off our
    basis (measured at giant width).

    Args:
      config: the architecture of the base, whose resampling the patch keeps.
      base_params: params before the repair.
      repaired_params: params after it.
      repaired_config: checked against `config` where it is known.
      compare_mask_token: False where one of the two layouts has no mask token.
      residual: what may be left out of a kernel or bias, relative to its norm.
      progress: called with kernel name and block before each SVD.

    Raises:
      ValueError: the models do not differ, or they differ in architecture, in a tensor
        that no ε changes (found before the first SVD), or in a kernel by more than its
        singular values; names each with its relative change. Or params that do not fit
        the config or are not finite float32 numbers.
    """
    if different := models.differences(config, repaired_config or config):
        raise ValueError(f"the architectures differ in {different}")
    param_tree.check(config, base_params)
    param_tree.check(config, repaired_params)
    flat, new_flat = (
        {path: np.asarray(leaf) for path, leaf in param_tree.flatten(params).items()}
        for params in (base_params, repaired_params)
    )
    rebuilt = (_rebuilt_parts(config, f) for f in (flat, new_flat))
    differences = _differences(*rebuilt)
    frozen = (_frozen_parts(config, f, compare_mask_token) for f in (flat, new_flat))
    _refuse(_differences(*frozen) | _beyond(differences, residual), residual)
    patch = _empty(config, base_params)
    for name, block, kernel, repaired in _changed_kernels(config, flat, new_flat):
        if progress is not None:
            progress(name, block)
        eps, probe, difference = _fit(kernel, repaired)
        patch.eps[name][block], patch.probe[name][block] = eps, probe
        differences[_in_block(name, block)] = difference
    _refuse(_beyond(differences, residual), residual)
    if not differences:
        raise ValueError("the two models do not differ: there is nothing to extract.")
    check(patch)
    return patch, Report(touched(patch), differences)


def _empty(config: ViTConfig, base_params: Params) -> Patch:
    eps = {n: np.zeros(shape, np.float32) for n, shape in _eps_shapes(config).items()}
    probe = {
        name: np.zeros((len(e), NUM_PROBES), np.float32) for name, e in eps.items()
    }
    return Patch(config, eps, param_tree.digest(param_tree.flatten(base_params)), probe)


def _eps_shapes(config: ViTConfig) -> dict[str, tuple[int, int]]:
    """[L, S] of every trainable kernel; none has a side shorter than D."""
    shape = (config.depth, config.embed_dim)
    return dict.fromkeys(kernels.names(config), shape)


Parts = Iterator[tuple[str, np.ndarray]]


def _differences(parts: Parts, new_parts: Parts) -> dict[str, Difference]:
    """Tensors that differ in a bit and have no ε: all of it is rest."""
    differences = {}
    for (name, old), (_, new) in zip(parts, new_parts, strict=True):
        if not _same_bits(old, new):
            change = _relative(new, old, old)
            differences[name] = Difference(change, change)
    return differences


def _rebuilt_parts(config: ViTConfig, flat: Mapping[str, np.ndarray]) -> Parts:
    """Without ε, in layers with one: q, k and the biases, which rounding may change."""
    for block in range(config.depth):
        for name in ("attn/q", "attn/k"):
            yield _in_block(name, block), kernels.view(config, flat, block, name)
    for path in _leaves(config, "bias"):
        yield from _by_block(path, flat[path])


def _frozen_parts(
    config: ViTConfig, flat: Mapping[str, np.ndarray], with_mask_token: bool
) -> Parts:
    """The tensors of all other layers; the class token as a digest takes it."""
    layers = {*_leaves(config, "kernel"), *_leaves(config, "bias")}
    yield "class token with position", flat[CLASS_TOKEN] + flat[POSITIONS][:, :1]
    yield "patch positions", flat[POSITIONS][:, 1:]
    for path in sorted(flat.keys() - layers - {CLASS_TOKEN, POSITIONS}):
        if path.startswith("blocks/"):
            yield from _by_block(path, flat[path])
        elif path != MASK_TOKEN or with_mask_token:
            yield path, flat[path]


def _by_block(path: str, leaf: np.ndarray) -> Parts:
    for block, part in enumerate(leaf):
        yield _in_block(path.removeprefix("blocks/"), block), part


def _changed_kernels(
    config: ViTConfig,
    flat: Mapping[str, np.ndarray],
    new_flat: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """(name, block, base, repaired) of each trainable kernel that differs in a bit."""
    for block in range(config.depth):
        for name in kernels.names(config):
            old, new = (
                kernels.view(config, tree, block, name) for tree in (flat, new_flat)
            )
            if not _same_bits(old, new):
                yield name, block, old, new


def _fit(
    kernel: Float[np.ndarray, "in out"], repaired: Float[np.ndarray, "in out"]
) -> tuple[np.ndarray, np.ndarray, Difference]:
    """ε and probe of one kernel, and what they leave out."""
    u, sigma, v = factor.factorize_kernel(kernel)
    # Merging rounds σ + ε to a float32: ε is the step to the nearest one, so that it is
    # 0, not noise, for most singular values that a run left alone.
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
    twice (1e-15), but their norms are 1 to 1e-7 only: hence the division, without which
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
    """Raises where models differ by what no ε says."""
    if wrong:
        listed = [f"{name} by {d.rest:.1g}" for name, d in wrong.items()]
        more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
        raise ValueError(
            "a repair changes singular values only, but relative to the base these "
            f"tensors differ otherwise: {', '.join(listed[:10])}{more} ({residual:g} "
            "is rounding)."
        )


# --- From a patch to the repaired model ---------------------------------------------


def check_base(patch: Patch, config: ViTConfig, model: str) -> None:
    """Refuses any model but the one the patch was made for.

    Args:
      patch: a patch.
      config: the model's architecture.
      model: its `param_tree.digest`.

    Raises:
      ValueError: another architecture or other weights.
    """
    if different := models.differences(patch.config, config):
        raise ValueError(f"the architectures differ in {different}")
    if patch.base != model:
        raise ValueError(
            f"the patch belongs to the model with digest {patch.base[:12]}…, this one "
            f"has {model[:12]}…: a patch fits the very weights it was made for only."
        )


def patched_leaf(
    patch: Patch,
    path: str,
    leaf: Any,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> np.ndarray:
    """One leaf of the base's params, repaired: so a model need not fit in memory.

    Args:
      patch: a patch; the caller has checked the whole model with `check_base`.
      path: flat name of the leaf, as "blocks/attn/qkv/kernel".
      leaf: float32, stacked over blocks where it belongs to one.
      scale: the share of ε that is applied, above 0 to 1.
      progress: called with kernel name and block before each SVD.

    Returns:
      V·diag(float32(σ + scale·ε))·Uᵀ for the trainable kernels of touched blocks, q and
      k beside them and every other leaf bit for bit.

    Raises:
      ValueError: a scale out of range, a leaf that is not of this model, or singular
        vectors that came out other than those ε belongs to.
    """
    check_scale(scale)
    leaf = np.asarray(leaf)
    _check_leaf(patch.config, path, leaf)
    names = [n for n in kernels.names(patch.config) if kernels.PLACES[n].path == path]
    blocks = touched(patch)
    if not (names and blocks):
        return leaf
    patched = np.array(leaf)
    for block in blocks:
        if progress is not None:
            progress(names[0], block)
        kernel = kernels.view(patch.config, {path: patched}, block, names[0])
        kernel[:] = _patched_kernel(patch, names[0], block, kernel, scale)
    return patched


def apply(
    config: ViTConfig,
    base_params: Params,
    patch: Patch,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The repaired model: `patched_leaf` of every leaf of the base.

    Args:
      config: the architecture of the base.
      base_params: the params that the patch belongs to; not changed.
      patch: a patch.
      scale: the share of ε that is applied, above 0 to 1.
      progress: called with kernel name and block before each SVD.

    Returns:
      A params tree of host arrays; with scale 1 it has the bits that `factor.merge`
      gives for the same ε on the same machine.

    Raises:
      ValueError: another base, a scale out of range, or singular vectors that came out
        other than those ε belongs to.
    """
    check_scale(scale)
    flat = param_tree.flatten(base_params)
    check_base(patch, config, param_tree.digest(flat))
    return param_tree.unflatten(
        {
            path: patched_leaf(patch, path, leaf, scale, progress)
            for path, leaf in flat.items()
        }
    )


def _patched_kernel(
    patch: Patch,
    name: str,
    block: int,
    kernel: Float[np.ndarray, "in out"],
    scale: float,
) -> np.ndarray:
    u, sigma, v = factor.factorize_kernel(kernel)
    eps = patch.eps[name][block]
    error = np.abs(_probe(u, eps, v) - patch.probe[name][block])
    if not np.all(error <= PROBE_TOLERANCE):
        raise ValueError(
            f"{_in_block(name, block)}: the singular vectors computed here are not "
            "those of its ε; of equal singular values, another linear algebra library "
            "turns them. Apply the patch where it was made, and copy the model."
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
    ‖E‖²/‖ε‖²: a basis that turned shows at once, whatever the scale and however small ε
    is beside W.
    """
    norm = np.linalg.norm(eps.astype(np.float64))
    if norm == 0:
        return np.zeros(NUM_PROBES)
    # NumPy promises that RandomState draws the same numbers for ever.
    a, b = (
        np.random.RandomState(seed).standard_normal((NUM_PROBES, len(side)))
        for seed, side in enumerate((v, u))
    )
    return ((a @ v) * (b @ u)) @ (eps / norm)


def check_scale(scale: float) -> None:
    """Raises ValueError unless `scale` is a share of the change that can be applied."""
    if not 0 < scale <= 1:
        raise ValueError(
            f"scale must be above 0 and at most 1, got {scale}; going back is the base "
            "file."
        )


def _check_leaf(config: ViTConfig, path: str, leaf: np.ndarray) -> None:
    shapes = param_tree.flatten(param_tree.shapes(config))
    want = shapes[path].shape if path in shapes else "no such leaf"
    if leaf.shape != want or leaf.dtype != np.float32:
        raise ValueError(
            f"{path} is {leaf.dtype} {leaf.shape}; in this model it is float32 {want}."
        )


def check(patch: Patch) -> None:
    """Raises ValueError unless all parts of a patch fit its config and are finite."""
    shapes = _eps_shapes(patch.config)
    probes = {name: (depth, NUM_PROBES) for name, (depth, _) in shapes.items()}
    for part, want in (("eps", shapes), ("probe", probes)):
        arrays = getattr(patch, part)
        got = {name: np.shape(array) for name, array in arrays.items()}
        if got != want:
            raise ValueError(f"{part} must hold {want} for this model; got {got}.")
        for name, array in arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"{part} of {name} must be finite float32 numbers.")
    if not re.fullmatch("[0-9a-f]{64}", patch.base):
        raise ValueError(f"the base's digest must be a SHA-256, got {patch.base!r}.")
    if not touched(patch):
        raise ValueError("ε is zero throughout: there is nothing to patch.")


# --- Leaves and kernels -------------------------------------------------------------


def _leaves(config: ViTConfig, kind: str) -> list[str]:
    """The "kernel" or "bias" leaves of the layers that hold trainable kernels."""
    return [f"blocks/{layer}/{kind}" for layer in kernels.layers(config)]


def _in_block(name: str, block: int) -> str:
    return f"{name} of block {block}"


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def _relative(a: np.ndarray, b: np.ndarray, base: np.ndarray) -> float:
    """‖a − b‖ / ‖base‖; where the base is zero, of `a` instead."""
    a, b, base = (np.asarray(x, np.float64) for x in (a, b, base))
    distance = np.linalg.norm(a - b)
    norm = np.linalg.norm(base) or np.linalg.norm(a)
    return float(distance / norm) if distance else 0.0  # -0.0 differs from 0.0 in bits
