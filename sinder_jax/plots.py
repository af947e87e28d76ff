"""The figures of the paper, from arrays: one function a figure. Only here: matplotlib.

    angles [L, N], defective [L, N] --violins--> an Axes with one violin a block
    arrays --norms, angles, theory, clamping, ...--> Figure --encode--> PNG, PDF, SVG

Figures have the size they are printed at: one column of a two-column page, or both.
Whatever is compared shares its scale. Colors are safe for color-blind readers (Okabe
and Ito's palette; cividis, dark for small angles). matplotlib is imported when the
first figure is drawn, and its global settings are left alone.
"""

import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Complex, Float, Int, UInt8

Figure = Any  # matplotlib's, see above
Axes = Any

COLUMN, PAGE = 3.35, 6.9  # inches
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, GRAY = "#CC79A7", "#56B4E9", "#777777"
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GRAY)
MARKERS = "osD^vPX"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.0,
    "mathtext.fontset": "dejavusans",
    "pdf.fonttype": 42,  # TrueType: text that can be searched and edited
    "svg.hashsalt": "sinder_jax",  # the same figure is the same bytes
}
PIP = "pip install 'sinder_jax[plots]'"
BINS = 120  # where a violin's width is evaluated
LARGE = 3.0  # times the median norm: as `analysis.count_large_norms` has it

Values = Float[np.ndarray, "L N"]
Marks = Bool[np.ndarray, "L N"]
Picture = UInt8[np.ndarray, "H W 3"]
Photo = UInt8[np.ndarray, "height width 3"]


def check_installed() -> None:
    """Raises ImportError, with the line for pip, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError(
            f"figures are drawn by matplotlib, which is not installed: {PIP}"
        ) from None


def encode(figure: Figure, kind: str, *, dpi: int = 200) -> bytes:
    """A figure as the bytes of a file; the same figure gives the same bytes.

    Args:
      figure: of one of the functions here.
      kind: "png", "pdf" or "svg".
      dpi: dots per inch of a PNG, and of the pictures in the others.
    """
    import matplotlib

    when = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind, dpi=dpi, metadata=when)
    return _rounded(file.getvalue()) if kind == "svg" else file.getvalue()


def _rounded(svg: bytes) -> bytes:
    """Two decimals of a point are enough for a path, and half the bytes."""
    return re.sub(
        rb' d="[^"]*"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path[0]), svg
    )


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Runs `draw` under STYLE, and puts the global settings back."""

    @functools.wraps(draw)
    def styled(*arguments: Any, **options: Any) -> Figure:
        check_installed()
        import matplotlib

        with matplotlib.rc_context(STYLE):
            figure = draw(*arguments, **options)
            # Laid out once, not again in every format.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure

    return styled


# --- Parts of figures: they take an Axes and return it --------------------------------


def violins(
    ax: Axes,
    values: Values,
    marked: Marks | None = None,
    *,
    log: bool = False,
    color: str = BLUE,
) -> Axes:
    """One violin a block, its median as a white dash; marked tokens as dots beside it.

    Args:
      ax: to draw on.
      values: one number per token.
      marked: tokens that are shown one by one, and left out of the violin: the
        defective ones, which the paper's figures show as isolated points.
      log: a logarithmic axis; values must be positive.
      color: of the violins; dots are vermilion.
    """
    from matplotlib.collections import PolyCollection

    marked = np.zeros(values.shape, bool) if marked is None else marked
    if log:
        ax.set_yscale("log")
    bodies, medians = [], []
    for block, (row, dots) in enumerate(zip(values, marked, strict=True)):
        row = np.log10(row[~dots]) if log else row[~dots]
        if row.size:
            at, width = _density(row)
            at = np.concatenate([at, at[::-1]])
            sides = np.concatenate([block - width, block + width[::-1]])
            bodies.append(np.stack([sides, 10**at if log else at], axis=1))
            median = float(np.median(row))
            medians.append((block, 10**median if log else median))
    ax.add_collection(PolyCollection(bodies, facecolors=color, alpha=0.75, lw=0))
    for_medians = np.array(medians).reshape(-1, 2)
    middle = for_medians[:, 0]
    ax.hlines(for_medians[:, 1], middle - 0.2, middle + 0.2, colors="white")
    ax.plot(
        *(np.nonzero(marked)[0], values[marked]),
        ".",
        color=VERMILION,
        markersize=3,
        markeredgewidth=0,
    )
    ax.autoscale_view()
    return _block_axis(ax, len(values))


def _density(
    row: Float[np.ndarray, " N"],
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Where a violin is how wide, at most 0.42 of a block: a Gaussian kernel density.

    The bandwidth is Scott's, which for violins of many tokens is a good eye's.
    """
    low, high = float(row.min()), float(row.max())
    bandwidth = float(row.std()) * len(row) ** -0.2
    if not bandwidth > 1e-9 * max(abs(low), abs(high)):
        return np.array([low, high]), np.array([0.42, 0.42])  # all the same: a dash
    counts, edges = np.histogram(row, BINS, (low, high))
    at = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-((at[:, None] - at[None, :]) ** 2) / (2 * bandwidth**2))
    density = kernel @ counts
    return at, 0.42 * density / density.max()


def _block_axis(ax: Axes, depth: int) -> Axes:
    """Blocks from 0 along x, with as many numbers as there is room for."""
    from matplotlib import ticker

    ax.set_xlim(-0.8, depth - 0.2)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    ax.set_xlabel("block, from 0")
    return ax


def _degree_axis(ax: Axes, label: str) -> Axes:
    ax.set_ylim(-2, 92)
    ax.set_yticks(range(0, 91, 15))
    ax.set_ylabel(label)
    return ax


def picture(ax: Axes, pixels: np.ndarray, **options: Any) -> Any:
    """A picture without axes, one square a patch; returns what a color bar needs."""
    shown = ax.imshow(pixels, interpolation="nearest", **options)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return shown


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _dots_legend(ax: Axes, marked: Mapping[str, Marks] | None, where: str) -> None:
    if marked and any(each.any() for each in marked.values()):
        label = r"detected along $\nu_i$"
        ax.plot([], [], ".", color=VERMILION, markersize=5, label=label)
        ax.legend(loc=where, handletextpad=0.1, borderpad=0.1)


# --- Tokens (figures 1-3, 5, 6 and 8) -------------------------------------------------


@_styled
def norms(
    values: Mapping[str, Values], marked: Mapping[str, Marks] | None = None
) -> Figure:
    """Figure 2: norms of the patch tokens, a violin a block, a panel a model.

    Args:
      values: norms by the model's name ("": it needs none), of all images together.
      marked: the defective tokens, by the same names.
    """
    figure = _figure(COLUMN, 0.5 + 1.6 * len(values))
    panels = figure.subplots(len(values), 1, sharex=True, sharey=True, squeeze=False)
    for ax, (name, each) in zip(panels[:, 0], values.items(), strict=True):
        violins(ax, each, marked[name] if marked else None, log=True)
        ax.set_ylabel("norm of patch tokens")
        ax.set_title(name)
    figure.suptitle("Norms of the patch tokens")
    _only_lowest_label(panels[:, 0])
    _dots_legend(panels[0, 0], marked, "upper left")
    return figure


@_styled
def angles(
    values: Mapping[str, Values],
    marked: Mapping[str, Marks] | None = None,
    *,
    direction: str = r"$\nu_i$",
) -> Figure:
    """Figures 2d and 8: angles between a direction and patch tokens, a violin a block.

    Args:
      values: degrees from 0 to 90 by the model's name, of one image.
      marked: the defective tokens, by the same names.
      direction: what the axis calls it, such as "a random direction".
    """
    figure = _figure(COLUMN, 0.5 + 1.6 * len(values))
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)
    for ax, (name, each) in zip(panels[:, 0], values.items(), strict=True):
        violins(ax, each, marked[name] if marked else None)
        _degree_axis(ax, "angle (degrees)")
        ax.set_title(name)
    figure.suptitle(f"Angle between {direction} and patch tokens")
    _only_lowest_label(panels[:, 0])
    _dots_legend(panels[0, 0], marked, "lower left")
    return figure


def _only_lowest_label(panels: Iterable[Axes]) -> None:
    for ax in list(panels)[:-1]:
        ax.set_xlabel("")


@_styled
def theory(
    to_theory: Float[np.ndarray, " L"],
    spread: Float[np.ndarray, " L"],
    pairwise: Float[np.ndarray, "L pairs"],
    to_layerwise: Float[np.ndarray, " L"],
    to_random: Float[np.ndarray, " L"],
) -> Figure:
    """Figure 2: the direction that theory predicts against the one that is measured.

    Measured is the mean direction of the tokens of highest norm over the images.

    Args:
      to_theory: its angle to ν_i, in degrees.
      spread: of the images' own directions about it, in degrees.
      pairwise: angles between the directions of two images; no columns for one image.
      to_layerwise: its angle to the leading left singular vector of block i alone.
      to_random: its angle to a random direction, the control.
    """
    figure = _figure(COLUMN, 2.5)
    ax = figure.subplots()
    at = np.arange(len(to_theory))
    lines = {
        "random direction": (to_random, GRAY, ":", "none"),
        "block $i$ alone": (to_layerwise, ORANGE, "--", "^"),
        r"theory, $\nu_i$": (to_theory, BLUE, "-", "o"),
    }
    for label, (values, color, line, marker) in lines.items():
        ax.plot(at, values, line, color=color, marker=marker, label=label)
    if pairwise.shape[1]:
        ax.plot(at, pairwise, "_", color=VERMILION, alpha=0.6, markersize=4)
        ax.plot([], [], "_", color=VERMILION, label="between two images")
        ax.fill_between(
            at, 0, spread, color=GREEN, alpha=0.3, lw=0, label="spread over images"
        )
    _degree_axis(ax, "angle to the measured\ndirection (degrees)")
    ax.set_title("Theory against experience")
    figure.legend(loc="outside lower center", ncols=2)
    return _block_axis(ax, len(at)).figure


@_styled
def clamping(
    pictures: Mapping[str, Picture], values: Mapping[str, Float[np.ndarray, " N"]]
) -> Figure:
    """Figure 5: PCA and norms of the last block's tokens, a column a threshold γ.

    Args:
      pictures: PCA by the columns' titles, such as "γ = 2.0".
      values: token norms by the same titles; a dot each above 3 x the median.
    """
    rows, columns = next(iter(pictures.values())).shape[:2]
    width = PAGE / max(len(pictures), 4)
    figure = _figure(width * len(pictures), 0.35 + width * rows / columns + 1.5)
    above, below = figure.subplots(
        2,
        len(pictures),
        sharey="row",
        squeeze=False,
        gridspec_kw={"height_ratios": [width * rows / columns, 1.4]},
    )
    for ax, (title, pixels) in zip(above, pictures.items(), strict=True):
        picture(ax, pixels)
        ax.set_title(title)
    for ax, row in zip(below, values.values(), strict=True):
        violins(ax, row[None], (row > LARGE * np.median(row))[None], log=True)
        ax.set_xlim(-0.6, 0.6)
        ax.set_xticks([])
        ax.set_xlabel(f"largest / median\n{row.max() / np.median(row):.2f}")
    below[0].set_ylabel("norm of patch tokens")
    return figure


@_styled
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
    """Figure 6: angles to ν_i by block; for chosen blocks what is seen and detected.

    Args:
      values: angles in degrees, of one image.
      marked: the defective tokens.
      chosen: the blocks that have a column each below the violins.
      pca: PCA of their tokens.
      heat: angles to ν_i of their tokens; dark means small.
      detected: their defective tokens.
      targets: PCA of the learning target of every token, by temperature τ; of one block
        all in the same colors.
      mask_thr: μ, for the label.
    """
    grid = 3 + len(targets)
    tall = heat.shape[1] / heat.shape[2]
    side = (PAGE - 0.9) / max(len(chosen), 4)
    figure = _figure(0.9 + side * len(chosen), 2.0 + grid * (side * tall + 0.04))
    top, bottom = figure.subfigures(
        2, 1, height_ratios=[1.9, grid * (side * tall + 0.04)], hspace=0.0
    )
    ax = top.subplots()
    violins(ax, values, marked)
    for block in chosen:
        ax.axvspan(block - 0.5, block + 0.5, color=GRAY, alpha=0.2, lw=0)
    _degree_axis(ax, "angle (degrees)")
    ax.set_title(r"Angle between $\nu_i$ and patch tokens")
    panels = bottom.subplots(grid, len(chosen), squeeze=False)
    low = 10 * np.floor(float(heat.min()) / 10)
    names = ["PCA", "angle", f"detected\n$\\mu$ = {mask_thr:g}"]
    names += [f"target\n$\\tau$ = {tau:g}" for tau in targets]
    for column, block in enumerate(chosen):
        picture(panels[0, column], pca[column])
        warm = picture(
            panels[1, column], heat[column], cmap="cividis", vmin=low, vmax=90
        )
        picture(panels[2, column], detected[column], cmap="gray", vmin=0, vmax=1)
        for i, target in enumerate(targets.values()):
            picture(panels[3 + i, column], target[column])
        panels[0, column].set_title(f"block {block}")
    for ax, name in zip(panels[:, 0], names, strict=True):
        ax.set_ylabel(name, fontsize=7)
    # Inside the last panel's margin, so that the columns stay aligned.
    beside = panels[1, -1].inset_axes((1.06, 0.0, 0.06, 1.0))
    bottom.colorbar(warm, cax=beside, label="degrees")
    return figure


@_styled
def pca(photo: Photo, pictures: Mapping[str, Picture]) -> Figure:
    """Figures 1 and 3: a photograph and the PCA of its patch tokens, by model.

    Args:
      photo: what the models saw.
      pictures: PCA by the model's name: before, with registers, after.
    """
    tall = photo.shape[0] / photo.shape[1]
    count = 1 + len(pictures)
    width = min(COLUMN / 2 * count, PAGE)
    figure = _figure(width, 0.25 + width / count * tall)
    for ax, (name, pixels) in zip(
        figure.subplots(1, count),
        {"photograph": photo, **pictures}.items(),
        strict=True,
    ):
        picture(ax, pixels)
        ax.set_title(name)
    return figure


@_styled
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
    figure = _figure(COLUMN, 2.3)
    ax = figure.subplots()
    at = np.arange(len(attention))
    ax.axhline(0, color="black", lw=0.6)
    parts = {"attention": (attention, -0.2, SKY), "FFN": (ffn, 0.2, VERMILION)}
    for name, (part, shift, color) in parts.items():
        ax.bar(at + shift, part.mean(axis=1), 0.4, color=color, label=name)
    sums = start[None] + np.cumsum(attention + ffn, axis=0)
    ax.plot(at, sums.mean(axis=1), "-o", color="black", markersize=2, label="sum")
    ax.set_ylabel(r"part along $\nu$")
    ax.set_title(r"What each block adds along $\nu$")
    ax.legend(loc="best")
    return _block_axis(ax, len(at)).figure


# --- Weights --------------------------------------------------------------------------


@_styled
def changes(values: Mapping[str, Float[np.ndarray, "L leading"]]) -> Figure:
    """Figure 7: learned minus original singular values, by block and kernel.

    Args:
      values: differences of the leading singular values, by the kernel's name.
    """
    figure = _figure(COLUMN, 0.6 + 1.05 * len(values))
    panels = figure.subplots(len(values), 1, sharex=True, sharey=True, squeeze=False)
    for ax, (name, each) in zip(panels[:, 0], values.items(), strict=True):
        ax.axhline(0, color=GRAY, lw=0.6)
        for i, line in enumerate(each.T):
            ax.plot(
                line,
                color=SERIES[i % len(SERIES)],
                marker=MARKERS[i % len(MARKERS)],
                label=f"$i$ = {i}",
            )
        ax.set_title(name, loc="left")
        _block_axis(ax, len(each))
    _only_lowest_label(panels[:, 0])
    figure.supylabel("learned − original singular value", fontsize=8)
    panels[0, 0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.98))
    return figure


@_styled
def forecast(
    gaps: Mapping[str, Float[np.ndarray, " L"]],
    block: int,
    labels: Sequence[str],
    shares: Sequence[float],
) -> Figure:
    """What the weights alone say: how dominant one direction becomes, and by whom.

    Args:
      gaps: σ0/σ1 of the running products, by the model's name.
      block: where the defect appears in the first model; -1: nowhere.
      labels: the kernels' singular values that carry it, most to blame first; may be
        empty.
      shares: of the gain along ν, from 0 to 1.
    """
    figure = _figure(COLUMN, 2.1 + 0.35 + 0.17 * len(labels))
    above = figure
    if labels:
        above, below = figure.subfigures(
            2, 1, height_ratios=[2.1, 0.5 + 0.17 * len(labels)]
        )
        ax = below.subplots()
        ax.barh(range(len(labels)), np.asarray(shares) * 100, color=VERMILION)
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.set_xlabel("share of the gain along $\\nu$ (%)")
    ax = above.subplots()
    for i, (name, line) in enumerate(gaps.items()):
        ax.plot(line, color=SERIES[i], marker=MARKERS[i], label=name)
    if block >= 0:
        ax.axvline(block, color=VERMILION, lw=0.8, ls="--", label="defect appears")
    _log_axis(ax)
    ax.set_ylabel(r"$\sigma_0/\sigma_1$ of blocks 0 to $i$")
    ax.set_title("Defect forecast from the weights")
    ax.legend(loc="best")
    _block_axis(ax, len(next(iter(gaps.values()))))
    return figure


@_styled
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
      share_negative: share of negative real part.
    """
    figure = _figure(COLUMN, 5.0)
    one, two, three = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.4, 1, 1]}
    )
    for i, (name, line) in enumerate(leading.items()):
        one.plot(
            line,
            color=SERIES[i % len(SERIES)],
            marker=MARKERS[i % len(MARKERS)],
            label=name,
        )
    _log_axis(one)
    one.set_ylabel(r"$\sigma_0$")
    one.set_title("Leading singular value of the kernels")
    # Below its panel, where the shared axis leaves room: lines run all over it.
    one.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.04))
    two.plot(ratios, "-o", color=BLUE)
    _log_axis(two)
    two.set_ylabel(r"$\sigma_0/\sigma_1$")
    two.set_title("Linear map of each block: singular values")
    three.plot(100 * share_inside, "-o", color=BLUE, label=r"$|\lambda| < 1$")
    three.plot(100 * share_negative, "--s", color=ORANGE, label=r"Re $\lambda$ < 0")
    three.set_ylim(-4, 104)
    three.set_ylabel("share (%)")
    three.set_title("Linear map of each block: eigenvalues")
    three.legend(loc="best")
    for ax in (one, two, three):
        _block_axis(ax, len(ratios))
    _only_lowest_label((one, two, three))
    return figure


@_styled
def eigenvalues(
    values: Complex[np.ndarray, "L D"], chosen: Sequence[int] | Int[np.ndarray, " k"]
) -> Figure:
    """Eigenvalues of the linear maps of chosen blocks, in the complex plane."""
    figure = _figure(min(PAGE, COLUMN / 2 * len(chosen)), 2.1)
    panels = figure.subplots(1, len(chosen), sharex=True, sharey=True, squeeze=False)
    turn = np.exp(2j * np.pi * np.linspace(0, 1, 400))
    shown = values[list(chosen)]
    middle = (shown.real.min() + shown.real.max()) / 2
    reach = 1.15 * max(np.ptp(shown.real) / 2, np.abs(shown.imag).max(), 0.05)
    for ax, block in zip(panels[0], chosen, strict=True):
        ax.plot(turn.real, turn.imag, color=GRAY, lw=0.6)
        ax.plot(values[block].real, values[block].imag, ".", color=BLUE, markersize=2)
        ax.set_title(f"block {block}")
        ax.set_xlabel(r"Re $\lambda$")
        ax.set_xlim(middle - reach, middle + reach)
        ax.set_ylim(-reach, reach)
        ax.set_aspect("equal", "box")
    panels[0, 0].set_ylabel(r"Im $\lambda$")
    return figure


def _log_axis(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers, also where it spans no power of ten."""
    from matplotlib import ticker

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 30:
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        if high / low < 4:
            ax.yaxis.set_major_locator(ticker.MaxNLocator(4))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
