"""Figures of what the weights alone show: forecast, spectra, figure 7 of the paper.

arrays from `analysis.forecast` and `analysis.spectra` --one function each--> Figure
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Complex, Float, Int
from matplotlib.figure import Figure, FigureBase

from sinder_jax.plots import style
from sinder_jax.plots.style import BLUE, COLUMN, GRAY, ORANGE, PAGE, VERMILION


@style.styled
def changes(values: Mapping[str, Float[np.ndarray, "L leading"]]) -> Figure:
    """Figure 7: learned minus original singular values, by block and kernel.

    Args:
      values: differences of the leading singular values, by the kernel's name.
    """
    figure, panels = style.stacked(values, 1.05, room=0.6, loc="left")
    for ax, each in zip(panels, values.values(), strict=True):
        ax.axhline(0, color=GRAY, lw=0.6)
        style.series(ax, {f"$i$ = {i}": line for i, line in enumerate(each.T)})
        ax.label_outer()
    figure.supylabel("learned − original singular value")
    panels[0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.98))
    return figure


@style.styled
def forecast(
    gaps: Mapping[str, Float[np.ndarray, " L"]],
    block: int,
    labels: Sequence[str],
    shares: Sequence[float],
) -> Figure:
    """How dominant one direction becomes, and which singular values make it so.

    Args:
      gaps: σ0/σ1 of the running products, by the model's name.
      block: where the defect appears in the first model; -1: nowhere.
      labels: the kernels' singular values that carry it, most to blame first; may be
        empty.
      shares: of the gain along ν, from 0 to 1.
    """
    figure = style.new_figure(COLUMN, 2.1 + 0.35 + 0.17 * len(labels))
    above: FigureBase = figure
    if labels:
        heights = [2.1, 0.5 + 0.17 * len(labels)]
        parts = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)
        above, below = parts[:, 0]
        ax = below.subplots()
        ax.barh(range(len(labels)), np.asarray(shares) * 100, color=VERMILION)
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.set_xlabel("share of the gain along $\\nu$ (%)")
    ax = above.subplots()
    style.series(ax, gaps)
    if block >= 0:
        ax.axvline(block, color=VERMILION, lw=0.8, ls="--", label="defect appears")
    style.log_axis(ax)
    ax.set_ylabel(r"$\sigma_0/\sigma_1$ of blocks 0 to $i$")
    ax.set_title("Defect forecast from the weights")
    ax.legend(loc="best")
    return figure


@style.styled
def spectra(
    leading: Mapping[str, Float[np.ndarray, " L"]],
    ratios: Float[np.ndarray, " L"],
    share_inside: Float[np.ndarray, " L"],
    share_negative: Float[np.ndarray, " L"],
) -> Figure:
    """Singular values of the kernels, and the spectrum of each block's linear map.

    Args:
      leading: largest singular value of every kernel, by its name.
      ratios: σ0/σ1 of each single block map.
      share_inside: share of its eigenvalues λ with |λ| < 1, from 0 to 1.
      share_negative: share with a negative real part.
    """
    figure = style.new_figure(COLUMN, 5.0)
    one, two, three = panels = figure.subplots(
        3, 1, sharex=True, height_ratios=[7, 5, 5]
    )
    style.series(one, leading)
    style.log_axis(one)
    one.set_ylabel(r"$\sigma_0$")
    one.set_title("Leading singular value of the kernels")
    # Below its panel, where the shared axis leaves room: lines run all over it.
    one.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.04))
    style.series(two, {"": ratios})
    style.log_axis(two)
    two.set_ylabel(r"$\sigma_0/\sigma_1$")
    two.set_title("Linear map of each block: singular values")
    three.plot(100 * share_inside, "-o", color=BLUE, label=r"$|\lambda| < 1$")
    three.plot(100 * share_negative, "--s", color=ORANGE, label=r"Re $\lambda$ < 0")
    style.block_axis(three, len(ratios)).set_ylim(-4, 104)
    three.set_ylabel("share (%)")
    three.set_title("Linear map of each block: eigenvalues")
    three.legend(loc="best")
    for ax in panels:
        ax.label_outer()
    return figure


@style.styled
def eigenvalues(
    values: Complex[np.ndarray, "L D"], chosen: Sequence[int] | Int[np.ndarray, " k"]
) -> Figure:
    """Eigenvalues of the linear maps of chosen blocks, in the complex plane."""
    figure = style.new_figure(min(PAGE, COLUMN / 2 * len(chosen)), 2.1)
    panels = figure.subplots(1, len(chosen), sharex=True, sharey=True, squeeze=False)
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 400))
    shown = values[list(chosen)]
    middle = (shown.real.min() + shown.real.max()) / 2
    reach = 1.15 * max(np.ptp(shown.real) / 2, np.abs(shown.imag).max(), 0.05)
    for ax, block, each in zip(panels[0], chosen, shown, strict=True):
        ax.plot(circle.real, circle.imag, color=GRAY, lw=0.6)
        ax.plot(each.real, each.imag, ".", color=BLUE, markersize=2)
        ax.set_title(f"block {block}")
        ax.set_xlabel(r"Re $\lambda$")
        ax.set_xlim(middle - reach, middle + reach)
        ax.set_ylim(-reach, reach)
        ax.set_aspect("equal", "box")
    panels[0, 0].set_ylabel(r"Im $\lambda$")
    return figure
