"""Repair without photographs: ε that undo a singular defect, from the weights alone.

    params --forecast--> gaps, ν --explaining_blocks--> the few blocks to change
    E_i, G_i --subspaces of their leading vectors--> small matrices K_i(ε) ~ G_i(ε)
    K_i, gains along ν, price of ε --L-BFGS--> ε --factor.merge--> repaired params

docs/datafree.md derives the objective. The weights tell how far a block stretches which
direction. They do not tell which tokens set it off, nor how often: a repair that has
seen photographs closes the gate on just those tokens, while this one shortens the throw
for all.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sinder_jax import defects, factor, kernels, linalg, spectral_map, stretch
from sinder_jax.analysis import forecast as forecasts
from sinder_jax.analysis.forecast import MIN_GAP, Forecast
from sinder_jax.param_tree import Params
from sinder_jax.placement import on_host
from sinder_jax.vit import ViTConfig

PRICE = 1.0  # of ε as large as σ, as much as of a mean stretch e times too far
REACH = 4.0  # standard deviations that tokens may lie out along the trigger
TRIPLETS = 4  # leading ones of each product in the first subspaces ...
MORE = 2  # ... and in every round those of the products as changed so far
WIDTHS = 8  # subspaces are filled with zeros to a multiple: rounds share a compilation
MAX_ROUNDS = 12
AGREE = 1e-3  # log σ_0 of a product and of its subspace, at the end


class Repaired(NamedTuple):
    """What a data-free repair changed, and what it reached.

    Attributes:
      params: the repaired params; the very tree that was given if nothing is changed.
      eps: changes of the singular values, a dict like `factor.Factors.sigma`; zero but
        in `blocks`.
      factors: the basis of `eps`; zero but in `blocks`, as no other is needed.
      blocks: whose kernels are changed, in order; empty without defect.
      gaps_before, gaps_after: σ_0/σ_1 of each running product.
      paid: Σ ‖ε_k‖²/‖σ_k‖² over the changed kernels, before it is multiplied by the
        price.
      rounds: exact decompositions of the running products.
      iterations: of L-BFGS, in all rounds.
    """

    params: Params
    eps: dict[str, Float[np.ndarray, "L S"]]
    factors: factor.Factors
    blocks: tuple[int, ...]
    gaps_before: Float[np.ndarray, " L"]
    gaps_after: Float[np.ndarray, " L"]
    paid: float
    rounds: int
    iterations: int

    @property
    def has_defect(self) -> bool:
        """True if a gap still reaches `MIN_GAP`."""
        return bool(np.max(self.gaps_after) >= MIN_GAP)


def explaining_blocks(
    told: Forecast, maps: Sequence[Float[np.ndarray, "D D"]]
) -> dict[int, Float[np.ndarray, " D"]]:
    """The blocks that make a direction stand out, each with that direction.

    Up to the last gap that reaches `MIN_GAP`, the block is taken at which the gap grows
    most, and adds nothing any more along the line along which it throws: that of what
    it adds to its input along E_bᵀν. ν itself leans from that line toward the input.
    Then gaps and directions are computed again, and so on until no gap reaches
    `MIN_GAP`: a defect may hide another one behind it.

    Args:
      told: the forecast.
      maps: E_i of all blocks; not changed.

    Example:
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> told = forecasts.forecast(made.config, made.params)
      >>> maps = [defects.block_map(made.config, made.params, i) for i in range(12)]
      >>> list(explaining_blocks(told, maps))
      [5]
    """
    gaps, directions, maps = told.gaps, told.directions, list(maps)
    taken: dict[int, np.ndarray] = {}
    while np.any(too_large := gaps >= MIN_GAP):
        last = int(np.flatnonzero(too_large)[-1])
        left = [block for block in range(last + 1) if block not in taken]
        if not left:
            break
        growth = np.diff(np.log(gaps), prepend=0.0)
        block = max(left, key=lambda block: growth[block])
        nu = taken[block] = directions[block]
        added = maps[block] - np.eye(len(nu))
        line = added @ (nu @ maps[block])
        line /= max(float(np.linalg.norm(line)), linalg.TINY)
        maps[block] = maps[block] - np.outer(line, line @ added)
        found = defects.of_maps(maps.__getitem__, len(maps))
        gaps, directions = found.gaps, found.directions
    return dict(sorted(taken.items()))


def repair(
    config: ViTConfig,
    params: Params,
    *,
    found: defects.SingularDefects | None = None,
    price: float = PRICE,
    progress: Callable[[str], Any] = lambda line: None,
) -> Repaired:
    """Undoes a singular defect by changes ε of singular values, without photographs.

    Minimizes over ε

        mean_i max(0, log σ_0(G_i(ε)) - log σ_m(G_i(0)) - log τ)²
        + mean_b max(0, log ‖E_b(ε)ᵀν_b‖ - log τ)² + price · Σ_k ‖ε_k‖²/‖σ_k‖²

    over products i from the first changed block on, each with m of the changed blocks
    b, and their kernels k. τ is the largest gap in front of the defect. The FFN of a
    changed block is fitted to inputs that reach `REACH` standard deviations out along
    its `trigger`.

    Args:
      config: the architecture.
      params: the params tree; not changed.
      found: the directions, if they are known already; None: computed here.
      price: of a change that ordinary tokens see: for x ~ N(0, I) a kernel's
        E‖ΔW·x‖²/E‖W·x‖² is ‖ε‖²/‖σ‖². Above 0.
      progress: called with a line about each round.

    Returns:
      See `Repaired`. Without a forecast defect nothing is changed or computed.

    Raises:
      ValueError: a price that is not above 0.
      FloatingPointError: the search has not settled after `MAX_ROUNDS` rounds.
    """
    if not 0 < price < np.inf:
        raise ValueError(f"price must be above 0 and finite, got {price}")
    if found is None:
        found = defects.singular_defects(config, params)
    told = forecasts.forecast(config, params, found=found, count=1)
    maps: list[np.ndarray] = []
    if told.has_defect:
        map_of = functools.partial(defects.block_map, config, params)
        maps = list(linalg.in_parallel(map_of, range(config.depth)))
    directions = explaining_blocks(told, maps)
    blocks = tuple(directions)
    factors = factors_of(config, params, blocks)
    eps = {name: np.zeros_like(sigma) for name, sigma in factors.sigma.items()}
    if not blocks:
        gaps = told.gaps
        return Repaired(params, eps, factors, blocks, gaps, gaps, 0.0, 0, 0)
    before = told.gaps[: told.stretches[0].first]
    slack = float(np.log(np.max(before, initial=1.0)))
    search = _Search(config, params, directions, factors, maps, slack)
    with on_host(), jax.enable_x64(True):  # a TPU computes no float64
        values, rounds, iterations = search.run(price, progress)
    for block, each in zip(blocks, values, strict=True):
        for name, s in zip(kernels.names(config), each, strict=True):
            sigma = factors.sigma[name][block]
            eps[name][block] = s - sigma  # rounded; never below -σ, as s > 0
    params = factor.merge(params, factors, eps)
    after = defects.singular_defects(config, params)
    paid = sum(
        float(np.square(e[block]).sum() / np.square(factors.sigma[name][block]).sum())
        for name, e in eps.items()
        for block in blocks
    )
    return Repaired(
        params, eps, factors, blocks, told.gaps, after.gaps, paid, rounds, iterations
    )


def factors_of(
    config: ViTConfig, params: Params, blocks: Sequence[int]
) -> factor.Factors:
    """`factor.factorize` of a few blocks; all others are zero and take no memory."""
    _, stacks = kernels.split(config, params)
    factors = factor.Factors(u={}, sigma={}, v={})
    for name, stack in stacks.items():
        depth, width_in, width_out = np.shape(stack)
        size = min(width_in, width_out)
        factors.u[name] = np.zeros((depth, width_out, size), np.float32)
        factors.sigma[name] = np.zeros((depth, size), np.float32)
        factors.v[name] = np.zeros((depth, width_in, size), np.float32)
    jobs = [(name, block) for name in stacks for block in blocks]
    parts = linalg.in_parallel(
        lambda job: factor.factorize_kernel(np.asarray(stacks[job[0]][job[1]])), jobs
    )
    for (name, block), (u, sigma, v) in zip(jobs, parts, strict=True):
        factors.u[name][block] = u
        factors.sigma[name][block] = sigma
        factors.v[name][block] = v
    return factors


def trigger(
    weights: kernels.BlockWeights, nu: Float[np.ndarray, " D"]
) -> Float[np.ndarray, " D"]:
    """The unit input to which an FFN answers most along ν; zeros if to none."""
    fit = defects.hidden_fit(weights.ffn_layer, weights.first, weights.bias)
    answer = fit.T @ (weights.last.T @ (weights.gamma2 * nu))
    return answer / max(float(np.linalg.norm(answer)), linalg.TINY)


# --- The search: small problems, each corrected by exact decompositions ---------------


class _Search:
    """Finds the singular values; holds the maps and the subspaces of a repair."""

    def __init__(
        self,
        config: ViTConfig,
        params: Params,
        directions: Mapping[int, Float[np.ndarray, " D"]],
        factors: factor.Factors,
        maps: Sequence[Float[np.ndarray, "D D"]],
        slack: float,
    ):
        self.blocks, self.slack = tuple(directions), slack
        self.nu = np.stack(list(directions.values()))
        parts, sigma = [], []
        for block, nu in directions.items():
            weights = kernels.weights(config, params, block)
            four = [
                factor.KernelFactors(
                    *(x[n][block] for x in (factors.u, factors.sigma, factors.v))
                )
                for n in kernels.names(config)
            ]
            reach = REACH * trigger(weights, nu)
            parts.append(spectral_map.of_block(weights, four, reach))
            sigma.append(tuple(np.asarray(x.sigma, np.float64) for x in four))
        self.parts, self.sigma = tuple(parts), tuple(sigma)
        first = self.blocks[0]
        self.before = np.eye(config.embed_dim)
        for each in maps[:first]:
            self.before = each @ self.before
            self.before /= np.linalg.norm(self.before)
        self.own = list(maps[first:])

    def run(self, price: float, progress: Callable[[str], Any]) -> tuple[Any, int, int]:
        """Singular values of all changed blocks, rounds and iterations."""
        theta = jax.tree.map(jnp.zeros_like, self.sigma)
        count = min(TRIPLETS - 1 + len(self.blocks), len(self.before))
        triplets, logs = self.leading(self.sigma, count)
        ceiling, total = self.ceiling(logs), 0
        u, v = (np.stack([getattr(t, side) for t in triplets]) for side in "uv")
        for done in range(1, MAX_ROUNDS + 1):
            problem = self.problem(u, v, ceiling)
            theta, steps = stretch.minimize(problem, theta, price)
            values = jax.device_get(stretch.singular_values(problem, theta))
            total += int(steps)
            small = np.asarray(stretch.log_stretches(problem, values))
            triplets, logs = self.leading(values, MORE)
            apart = float(np.max(logs[:, 0] - small))
            progress(
                f"round {done}: {steps} iterations, σ0 at most "
                f"{np.exp(np.max(logs[:, 0] - ceiling - self.slack)):.3f} times its aim"
            )
            if apart < AGREE:
                return values, done, total
            u = _joined(u, [t.u for t in triplets])
            v = _joined(v, [t.v for t in triplets])
        raise FloatingPointError(
            f"the data-free repair has not settled after {MAX_ROUNDS} rounds: the "
            f"largest log σ0 is {apart:.3g} above that of its subspace"
        )

    def ceiling(self, logs: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
        """Returns log σ_m of each product; m of the changed blocks are in it."""
        first, n = self.blocks[0], len(logs)
        inside = np.searchsorted(self.blocks, np.arange(first, first + n), side="right")
        return logs[np.arange(n), np.minimum(inside, logs.shape[1] - 1)]

    def changed(self, values: Any) -> list[np.ndarray]:
        """The maps E_i from the first changed block on, with other singular values."""
        maps, identity = list(self.own), jnp.eye(len(self.before))
        for block, part, s in zip(self.blocks, self.parts, values, strict=True):
            now = spectral_map.apply(part, s, identity)
            maps[block - self.blocks[0]] = np.asarray(now)
        return maps

    def leading(
        self, values: Any, count: int
    ) -> tuple[list[linalg.Triplets], np.ndarray]:
        """Leading triplets of the products G_i and log σ, exactly."""
        maps = self.changed(values)
        maps[0] = maps[0] @ self.before
        found = list(linalg.running_triplets(maps.__getitem__, len(maps), count))
        logs = [log + np.log(np.maximum(t.s, linalg.TINY)) for t, log in found]
        return [t for t, _ in found], np.stack(logs)

    def problem(
        self, u: np.ndarray, v: np.ndarray, ceiling: np.ndarray
    ) -> stretch.Problem:
        """The objective in the subspaces u, v [n, D, k] of the products."""
        first, fill = self.blocks[0], (0, -u.shape[2] % WIDTHS)
        u, v = (np.pad(each, ((0, 0), (0, 0), fill)) for each in (u, v))
        ends = [*(b - first for b in self.blocks[1:]), len(self.own)]
        starts = [b - first for b in self.blocks]
        outputs = []
        for start, end in zip(starts, ends, strict=True):
            pulled = np.empty((0, u.shape[2], u.shape[1]))  # through E_end … E_i+1
            for i in range(end - 1, start - 1, -1):
                pulled = np.concatenate([u[i].T[None], pulled])
                pulled = pulled @ self.own[i] if i > start else pulled
            outputs.append(pulled)
        between = []
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            product = np.eye(u.shape[1])
            for i in range(start + 1, end):
                product = self.own[i] @ product
            between.append(product)
        problem = stretch.Problem(
            blocks=self.parts,
            sigma=self.sigma,
            nu=self.nu,
            between=tuple(between),
            inputs=np.concatenate([self.before @ each for each in v], axis=1),
            outputs=tuple(outputs),
            ceiling=ceiling,
            slack=np.asarray(self.slack),
        )
        return jax.tree.map(jnp.asarray, problem)


def _joined(basis: np.ndarray, more: list[np.ndarray]) -> np.ndarray:
    """Orthonormal bases [n, D, k] of each subspace and further vectors."""
    return np.linalg.qr(np.concatenate([basis, np.stack(more)], axis=2))[0]
