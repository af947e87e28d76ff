"""Figures of what patch tokens show: figures 1-3, 5, 6 and 8 of the paper.

norms, angles [L, N], defective tokens [L, N] --violins--> Axes, one violin a block
arrays --norms, angles, theory, clamping, blocks, pca, growth--> Figure
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, UInt8
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sinder_jax.plots import style
from sinder_jax.plots.style import COLUMN, GRAY, PAGE, VERMILION, Photo

Values = Float[np.ndarray, "L N"]
Marks = Bool[np.ndarray, "L N"]
Picture = UInt8[np.ndarray, "H W 3"]


# --- Violins --------------------------------------------------------------------------


def violins(
    ax: Axes,
    values: Values,
    marked: Marks | None = None,
    *,
    log: bool = False,
) -> Axes:
    """One violin per block, its median as a white dash; marked tokens as dots.

    Args:
      ax: to draw on.
      values: one number per token.
      marked: tokens shown one by one and left out of the violin: the defective tokens,
        isolated points in the paper's figures.
      log: a logarithmic axis, and violins of the logarithms; values must be positive.
    """
    marked = np.zeros(values.shape, bool) if marked is None else marked
    rows = [row[~dots] for row, dots in zip(values, marked, strict=True)]
    blocks = [block for block, row in enumerate(rows) if row.size]
    shapes = cbook.violin_stats(
        [np.log10(rows[block]) if log else rows[block] for block in blocks], _density
    )
    if log:
        ax.set_yscale("log")
        for shape in shapes:
            shape.update({key: 10 ** shape[key] for key in ("coords", "median")})
    drawn: Any = ax.violin(
        shapes, blocks, widths=0.84, showmedians=True, showextrema=False
    )
    for body in drawn["bodies"]:
        body.set(facecolor=style.BLUE, alpha=0.75, linewidth=0)
    drawn["cmedians"].set_color("white")
    block, _ = np.nonzero(marked)
    dots = ax.plot(block, values[marked], ".", color=VERMILION)
    dots[0].set(markersize=3, markeredgewidth=0)
    return style.block_axis(ax, len(values))


def _density(
    row: Float[np.ndarray, " N"], at: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """A Gaussian kernel density, by Scott's rule; flat where all values are equal."""
    if np.ptp(row) <= 1e-9 * np.abs(row).max():
        return np.ones_like(at)
    return scipy.stats.gaussian_kde(row)(at)


@style.styled
def norms(
    values: Mapping[str, Values], marked: Mapping[str, Marks] | None = None
) -> Figure:
    """Figure 2: norms of the patch tokens, a violin per block, a panel per model.

    Args:
      values: norms of all images together, by the model's name ("" for no title).
      marked: the defective tokens, by the same names.
    """
    figure, panels = _violin_panels(values, marked, "upper left", log=True)
    figure.suptitle("Norms of the patch tokens")
    for ax in panels:
        ax.set_ylabel("norm of patch tokens")
    return figure


@style.styled
def angles(
    values: Mapping[str, Values],
    marked: Mapping[str, Marks] | None = None,
    *,
    direction: str = r"$\nu_i$",
) -> Figure:
    """Figures 2d and 8: angles of patch tokens to a direction, a violin per block.

    Args:
      values: degrees from 0 to 90 by the model's name, of one image.
      marked: the defective tokens, by the same names.
      direction: its name in the title, such as "a random direction".
    """
    figure, panels = _violin_panels(values, marked, "lower left")
    figure.suptitle(f"Angle between {direction} and patch tokens")
    for ax in panels:
        style.degree_axis(ax, "angle (degrees)")
    return figure


def _violin_panels(
    values: Mapping[str, Values],
    marked: Mapping[str, Marks] | None,
    legend: Any,
    *,
    log: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A panel of violins per name; a legend at `legend` if there are dots."""
    marked = marked or {
        name: np.zeros(each.shape, bool) for name, each in values.items()
    }
    figure, panels = style.stacked(values, 1.6, room=0.5)
    for ax, (name, each) in zip(panels, values.items(), strict=True):
        violins(ax, each, marked[name], log=log)
        ax.label_outer()
    if any(dots.any() for dots in marked.values()):
        label = r"detected along $\nu_i$"
        panels[0].plot([], [], ".", color=VERMILION, markersize=5, label=label)
        panels[0].legend(loc=legend, handletextpad=0.1, borderpad=0.1)
    return figure, panels


# --- Directions and clamping ----------------------------------------------------------


@style.styled
def theory(
    to_theory: Float[np.ndarray, " L"],
    spread: Float[np.ndarray, " L"],
    pairwise: Float[np.ndarray, "L pairs"],
    to_layerwise: Float[np.ndarray, " L"],
    to_random: Float[np.ndarray, " L"],
) -> Figure:
    """Figure 2: the direction that theory predicts against the measured direction.

    The measured direction is the mean direction of the highest-norm tokens.

    Args:
      to_theory: its angle to ν_i, in degrees.
      spread: of the images' own directions about it, in degrees.
      pairwise: angles between the directions of two images; no columns for one image.
      to_layerwise: its angle to the leading left singular vector of block i alone.
      to_random: its angle to a random direction, the control.
    """
    figure = style.new_figure(COLUMN, 2.5)
    ax = figure.subplots()
    at = np.arange(len(to_theory))
    ax.plot(at, to_random, ":", color=GRAY, label="random direction")
    ax.plot(at, to_layerwise, "--^", color=style.ORANGE, label="block $i$ alone")
    ax.plot(at, to_theory, "-o", color=style.BLUE, label=r"theory, $\nu_i$")
    if pairwise.shape[1]:
        ax.plot(at, pairwise, "_", color=VERMILION, alpha=0.6, markersize=4)
        ax.plot([], [], "_", color=VERMILION, label="between two images")
        label = "spread over images"
        ax.fill_between(at, 0, spread, color=style.GREEN, alpha=0.3, lw=0, label=label)
    style.degree_axis(ax, "angle to the measured\ndirection (degrees)")
    ax.set_title("Theory against experience")
    figure.legend(loc="outside lower center", ncols=2)
    style.block_axis(ax, len(at))
    return figure


@style.styled
def clamping(
    pictures: Mapping[str, Picture],
    values: Mapping[str, Float[np.ndarray, " N"]],
    large: Mapping[str, Bool[np.ndarray, " N"]],
) -> Figure:
    """Figure 5: PCA and norms of the last block's tokens, a column per threshold γ.

    Args:
      pictures: PCA by the columns' titles, such as "γ = 2.0".
      values: token norms by the same titles.
      large: tokens drawn as dots, those of large norm, by the same titles.
    """
    rows, columns = next(iter(pictures.values())).shape[:2]
    width = PAGE / max(len(pictures), 4)
    height = width * rows / columns
    figure = style.new_figure(width * len(pictures), 0.35 + height + 1.5)
    above, below = figure.subplots(
        2, len(pictures), sharey="row", squeeze=False, height_ratios=[height, 1.4]
    )
    for ax, (title, image) in zip(above, pictures.items(), strict=True):
        style.picture(ax, image)
        ax.set_title(title)
    for ax, (title, row) in zip(below, values.items(), strict=True):
        violins(ax, row[None], large[title][None], log=True)
        ax.set_xlim(-0.6, 0.6)
        ax.set_xticks([])
        ax.set_xlabel(f"largest / median\n{row.max() / np.median(row):.2f}")
    below[0].set_ylabel("norm of patch tokens")
    return figure


# --- Pictures by block and by model ---------------------------------------------------


@style.styled
def blocks(
    values: Values,
    marked: Marks,
    chosen: Sequence[int],
    *,
    pca: UInt8[np.ndarray, "k H W 3"],
    heat: Float[np.ndarray, "k H W"],
    detected: Bool[np.ndarray, "k H W"],
    targets: Mapping[float, UInt8[np.ndarray, "k H W 3"]],
    mask_thr: float,
) -> Figure:
    """Figure 6: angles to ν_i by block; tokens, detection and targets of some blocks.

    Args:
      values: angles in degrees, of one image.
      marked: the defective tokens.
      chosen: the blocks that have a column each below the violins.
      pca: PCA of their tokens.
      heat: angles to ν_i of their tokens; dark means small.
      detected: their defective tokens.
      targets: PCA of the learning target of every token, by temperature τ; the targets
        of one block share their colors.
      mask_thr: μ, for the label.
    """
    angles = {"cmap": "cividis", "vmin": 10 * np.floor(heat.min() / 10), "vmax": 90}
    masks = {"cmap": "gray", "vmin": 0, "vmax": 1}
    rows = {
        "PCA": (pca, {}),
        "angle": (heat, angles),
        f"detected\n$\\mu$ = {mask_thr:g}": (detected, masks),
        **{f"target\n$\\tau$ = {tau:g}": (x, {}) for tau, x in targets.items()},
    }
    side = (PAGE - 0.9) / max(len(chosen), 4)
    height = len(rows) * (side * heat.shape[1] / heat.shape[2] + 0.04)
    figure = style.new_figure(0.9 + side * len(chosen), 2.0 + height)
    top, bottom = figure.subfigures(
        2, 1, height_ratios=[1.9, height], hspace=0.0, squeeze=False
    )[:, 0]
    ax = top.subplots()
    violins(ax, values, marked)
    for block in chosen:
        ax.axvspan(block - 0.5, block + 0.5, color=GRAY, alpha=0.2, lw=0)
    style.degree_axis(ax, "angle (degrees)")
    ax.set_title(r"Angle between $\nu_i$ and patch tokens")
    panels = bottom.subplots(len(rows), len(chosen), squeeze=False)
    for line, (name, (images, options)) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=7)
        shown = [
            style.picture(*each, **options) for each in zip(line, images, strict=True)
        ]
        if name == "angle":
            # Inside the last panel's margin, so that the columns stay aligned.
            beside = line[-1].inset_axes((1.06, 0.0, 0.06, 1.0))
            bottom.colorbar(shown[-1], cax=beside, label="degrees")
    for ax, block in zip(panels[0], chosen, strict=True):
        ax.set_title(f"block {block}")
    return figure


@style.styled
def pca(photo: Photo, pictures: Mapping[str, Picture]) -> Figure:
    """Figures 1 and 3: a photograph and the PCA of its patch tokens, by model.

    Args:
      photo: the image that the models saw.
      pictures: PCA by the model's name: before, with registers, after.
    """
    count = 1 + len(pictures)
    width = min(COLUMN / 2 * count, PAGE)
    height = width / count * photo.shape[0] / photo.shape[1]
    figure = style.new_figure(width, 0.25 + height)
    panels = figure.subplots(1, count)
    shown = {"photograph": photo, **pictures}
    for ax, (name, image) in zip(panels, shown.items(), strict=True):
        style.picture(ax, image)
        ax.set_title(name)
    return figure


@style.styled
def growth(
    attention: Float[np.ndarray, "L tokens"],
    ffn: Float[np.ndarray, "L tokens"],
    start: Float[np.ndarray, " tokens"],
) -> Figure:
    """How much each block adds to tokens along ν: attention and FFN, mean of tokens.

    Args:
      attention: what the attention of a block adds to each token's part along ν.
      ffn: what its FFN adds.
      start: the part along ν of the embedded tokens.
    """
    figure = style.new_figure(COLUMN, 2.3)
    ax = figure.subplots()
    at = np.arange(len(attention))
    ax.axhline(0, color="black", lw=0.6)
    ax.bar(at - 0.2, attention.mean(axis=1), 0.4, color=style.SKY, label="attention")
    ax.bar(at + 0.2, ffn.mean(axis=1), 0.4, color=VERMILION, label="FFN")
    sums = start[None] + np.cumsum(attention + ffn, axis=0)
    ax.plot(at, sums.mean(axis=1), "-o", color="black", markersize=2, label="sum")
    ax.set_ylabel(r"part along $\nu$")
    ax.set_title(r"What each block adds along $\nu$")
    ax.legend(loc="best")
    style.block_axis(ax, len(at))
    return figure
