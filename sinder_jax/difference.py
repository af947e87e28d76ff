"""How a repaired model differs from its base: by ε, by rounding, or in another way.

base params, repaired params --extract--> Delta, Report; or a refusal
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sinder_jax import delta as deltas
from sinder_jax import factor, kernels, param_tree
from sinder_jax.delta import BeforeSVD, Delta
from sinder_jax.param_tree import CLASS_TOKEN, MASK_TOKEN, POSITIONS, Params
from sinder_jax.vit import ViTConfig

# Rounding of a layer rebuilt from factors, relative to its norm: 2e-6 in the authors'
# recorded runs (tests/golden), up to 6e-6 with LAPACK's float32 SVDs at giant width.
ROUNDING = 1e-5


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
    delta = deltas.empty(config, base_params)
    for block in range(config.depth):
        for name in kernels.names(config):
            pair = [kernels.view(config, flat, block, name) for flat in (old, new)]
            if pair[0].tobytes() == pair[1].tobytes():
                continue
            if before_svd is not None:
                before_svd(name, block)
            delta.eps[name][block], delta.probe[name][block], found = _fit(*pair)
            differences[kernels.in_block(name, block)] = found
    _refuse(_beyond(differences, residual), residual)
    if not differences:
        raise ValueError("the two models do not differ: there is nothing to extract")
    deltas.check(delta)
    return delta, Report(differences)


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
            yield kernels.in_block(name, block), kernels.view(config, flat, block, name)
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
        yield kernels.in_block(path, block), part


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
    return eps, deltas.probe_of(u, eps, v), difference


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


def _relative(a: np.ndarray, b: np.ndarray, base: np.ndarray) -> float:
    """‖a − b‖ / ‖base‖; where the base is zero, ‖a − b‖ / ‖a‖."""
    a, b, base = (np.asarray(x, np.float64) for x in (a, b, base))
    distance = np.linalg.norm(a - b)
    norm = np.linalg.norm(base) or np.linalg.norm(a)
    return float(distance / norm) if distance else 0.0  # -0.0 differs from 0.0 in bits
