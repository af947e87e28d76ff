"""Forecast of singular defects from the weights alone: no image is needed.

    params --running products G_i--> directions ν_i, gaps σ_0/σ_1, turns ν_i to ν_i+1
    gaps, turns --longest stretch--> the block the defect appears in
    its kernels --singular triplets on the way to ν--> which singular values to blame

NumPy float64 on the host. The two thresholds were chosen on small models, planted and
random ones; they were not calibrated on published weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sinder_jax import defects, kernels
from sinder_jax.factor import factorize_kernel
from sinder_jax.linalg import TINY, Progress, in_parallel
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

MIN_GAP = 3.0
"""From this σ_0/σ_1 on, a running product is said to have a direction of its own.

Measured: planted models of twelve seeds have gaps of 10.6 to 11.8 from the planted
block on, and 1.05 at most with the planted unit taken out or the model repaired; the
recorded models of the tests, whose defects are smaller, have 4.7 at least. Random
models, where one direction stands out by chance, have up to 1.4 with a LayerScale of
0.3, and with one of 1 up to 2.4; but of 40 blocks of width 64 up to 6.7: there chance
looks like a defect. It does so less the wider the model (1.5 at width 384).
"""
MAX_TURN = 45.0
"""Degrees between ν_i and ν_i+1 up to which they are called one direction.

Measured: 27 at most within the planted and recorded defects; 84 and more where the next
defect of the same model takes over.
"""


class Blame(NamedTuple):
    """One singular triplet σ·u·vᵀ of a kernel, and what goes through it.

    Attributes:
      block: the block of the kernel.
      kernel: its name, see `kernels.names`.
      index: of the singular value, 0 the largest.
      singular_value: σ.
      share: of the block's gain along ν that passes through the triplet: what would be
        missing were σ zero. Two kernels in a row carry the same share, so shares of
        different kernels do not add up to 1; negative where a triplet works against ν.
    """

    block: int
    kernel: str
    index: int  # type: ignore[assignment]  # hides the method of tuples
    singular_value: float
    share: float


class Stretch(NamedTuple):
    """Blocks with one defect direction, both included; from 0."""

    first: int
    last: int


class Forecast(NamedTuple):
    """What the weights say about singular defects.

    Attributes:
      block: in which the defect appears, from 0: the first of the longest stretch, or
        of the earliest one if several are as long; -1 without defect.
      stretches: all of them, see `stretches`; empty without defect.
      directions: ν_i, leading left singular vector of each running product G_i = E_i·…
        ·E_0; unit rows, any sign.
      gaps: σ_0/σ_1 of each G_i, at least 1; near 1 its direction means nothing.
      growth: gap of each block over that of the block before; the first over 1.
      turns: angle between ν_i and ν_i+1, degrees; 0 for the last block.
      gain: |νᵀ·E·t| of the defect's block, with t the input it answers most: how much
        longer a token gets along ν; NaN without defect.
      blamed: the triplets with the largest shares, largest first; empty without defect.
    """

    block: int
    stretches: tuple[Stretch, ...]
    directions: Float[np.ndarray, "L D"]
    gaps: Float[np.ndarray, " L"]
    growth: Float[np.ndarray, " L"]
    turns: Float[np.ndarray, " L"]
    gain: float
    blamed: tuple[Blame, ...]

    @property
    def has_defect(self) -> bool:
        """True if the gap of a block reaches `MIN_GAP`."""
        return bool(self.stretches)

    @property
    def verdict(self) -> str:
        """The forecast in plain words."""
        gaps, turns, last_block = self.gaps, self.turns, len(self.gaps) - 1
        if not self.has_defect:
            widest = int(np.argmax(gaps))
            return (
                "No singular defect is forecast: up to no block do the linear maps "
                "stretch one direction much more than the next one. The largest gap "
                f"σ0/σ1 is {gaps[widest]:.2f} (block {widest}); from {MIN_GAP:g} on "
                "one is forecast."
            )
        first, last = next(run for run in self.stretches if run.first == self.block)
        gap = np.max(gaps[first : last + 1])
        text = f"A singular defect is forecast. It appears in block {first}"
        if last > first:
            turn = np.max(turns[first:last])
            text += (
                f" and lasts to block {last} (of blocks 0 to {last_block}), with a "
                f"direction that turns by at most {turn:.0f}° from block to block"
            )
        else:
            text += f" (of blocks 0 to {last_block}) and is not seen in the next one"
        text += (
            f". Along it, tokens are stretched up to {gap:.1f} times as much as along "
            f"any other direction. The input to which block {first} answers most "
            f"becomes {self.gain:.1f} times as long along it."
        )
        if self.blamed:
            top = self.blamed[0]
            text += (
                f" {100 * top.share:.0f} % of that passes through singular value "
                f"{top.index} of {top.kernel} ({top.singular_value:.2f})."
            )
        others = [str(run.first) for run in self.stretches if run.first != first]
        if others:
            text += f" Other directions stand out from block {', '.join(others)} on."
        return text


def forecast(
    config: ViTConfig,
    params: Params,
    *,
    found: defects.SingularDefects | None = None,
    count: int = 10,
    progress: Progress | None = None,
) -> Forecast:
    """Forecasts from the weights whether and where there is a defect, and its causes.

    Args:
      config: the architecture.
      params: the params tree.
      found: the directions, if they are known already; None: computed here.
      count: how many triplets to blame.
      progress: called as `progress(done, total)`, in blocks, from this thread.

    Example:
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> found = forecast(made.config, made.params)
      >>> found.has_defect, found.block == made.block
      (True, True)
      >>> found.blamed[0].kernel, found.blamed[0].index
      ('mlp/w3', 0)
    """
    if found is None:
        found = defects.singular_defects(config, params, progress=progress)
    nu, gap = found.directions, found.gaps
    cosine = np.abs(np.sum(nu[:-1] * nu[1:], axis=1))
    turns = np.append(np.degrees(np.arccos(np.minimum(cosine, 1.0))), 0.0)
    growth = gap / np.concatenate([[1.0], gap[:-1]])
    runs = stretches(gap, turns)
    if not runs:
        return Forecast(-1, (), nu, gap, growth, turns, float("nan"), ())
    block = max(runs, key=lambda run: run.last - run.first).first  # of equals the first
    gain, blamed = blame(config, params, block, nu[block], count=count)
    return Forecast(block, runs, nu, gap, growth, turns, gain, blamed)


def stretches(
    gaps: Float[np.ndarray, " L"], turns: Float[np.ndarray, " L"]
) -> tuple[Stretch, ...]:
    """Finds runs of blocks in which one direction stands out and hardly turns.

    Within a run every gap is at least `MIN_GAP`, and no direction turns by more than
    `MAX_TURN` to the next one.

    Returns:
      First and last block of each run, both included; in the order of the blocks.

    Example:
      >>> import numpy as np
      >>> gaps = np.array([1.0, 8.0, 7.5, 7.0, 6.5])
      >>> stretches(gaps, np.array([80.0, 3.0, 4.0, 70.0, 0.0]))
      (Stretch(first=1, last=3), Stretch(first=4, last=4))
    """
    found: list[Stretch] = []
    for block in np.flatnonzero(gaps >= MIN_GAP).tolist():
        goes_on = found and found[-1].last == block - 1
        if goes_on and turns[block - 1] <= MAX_TURN:
            found[-1] = found[-1]._replace(last=block)
        else:
            found.append(Stretch(block, block))
    return tuple(found)


# --- Which singular values carry it ---------------------------------------------------


def blame(
    config: ViTConfig,
    params: Params,
    block: int,
    direction: Float[np.ndarray, " D"],
    *,
    count: int = 10,
) -> tuple[float, tuple[Blame, ...]]:
    """The singular triplets through which a block throws tokens along a direction.

    With t = Eᵀν/‖Eᵀν‖, the input that the block E = M·A answers most along ν, the gain
    is νᵀ·E·t = ‖Eᵀν‖. Each kernel W = Σ σ_k·u_k·v_kᵀ stands between two vectors, a on
    its output and x on its input side, and the share of a triplet is
    (a·u_k)·σ_k·(v_k·x) / gain. The slopes of the FFN's hidden layer are held fixed.

    Args:
      config: the architecture.
      params: the params tree.
      block: from 0.
      direction: ν of that block, a unit vector.
      count: how many triplets to return.

    Returns:
      The gain, at least 0, and the triplets with the largest absolute shares.

    Raises:
      ValueError: a block that does not exist.
    """
    config.check_block(block)
    weights = kernels.weights(config, params, block)
    gain, sides = _kernel_sides(weights, np.asarray(direction, float))
    matrices = (weights.v, weights.proj, weights.first, weights.last)
    jobs = list(zip(kernels.names(config), matrices, sides, strict=True))

    def largest_shares(job: tuple[str, np.ndarray, Any]) -> list[Blame]:
        name, matrix, (outer, inner) = job
        u, sigma, v = (np.asarray(x, np.float64) for x in factorize_kernel(matrix.T))
        shares = (outer @ u) * sigma * (inner @ v) / max(gain, TINY)
        return [
            Blame(block, name, int(k), float(sigma[k]), float(shares[k]))
            for k in np.argsort(-np.abs(shares), kind="stable")[:count]
        ]

    found = sum(in_parallel(largest_shares, jobs), [])
    found.sort(key=lambda triplet: -abs(triplet.share))
    return gain, tuple(found[:count])


def _kernel_sides(
    weights: kernels.BlockWeights, nu: Float[np.ndarray, " D"]
) -> tuple[float, Sequence[tuple[np.ndarray, np.ndarray]]]:
    """The gain, and for each kernel a (output side) and x (input side) of `blame`."""
    w = weights
    attention, ffn = defects.attention_map(w), defects.ffn_map(w)
    pulled = ffn.T @ nu  # ν seen from between attention and FFN
    answer = attention.T @ pulled
    gain = float(np.linalg.norm(answer))  # of this t: νᵀ·E·t
    trigger = answer / max(gain, TINY)

    x = w.scale1 * (trigger - trigger.mean())
    a = w.gamma1 * pulled
    v, proj = (w.proj.T @ a, x), (a, w.v @ x)

    after = attention @ trigger
    x = w.scale2 * (after - after.mean())
    a = w.gamma2 * nu
    slopes = defects.hidden_slopes(w.ffn_layer, w.first, w.bias)
    up = slopes * (w.first @ x).reshape(slopes.shape)  # of gate and value of a unit
    back = slopes * (w.last.T @ a)[None, :]
    return gain, (v, proj, (back.ravel(), x), (a, up.sum(axis=0)))
