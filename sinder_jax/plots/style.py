"""What all figures share: sizes, colors, axes, and how a figure becomes a file.

    arrays --a function under @styled--> Figure --encode--> PNG, PDF, SVG
                                         Figure --pixels--> an RGB array

Figures have the size they are printed at: one column of a two-column page, or both.
Things to be compared share a scale. Colors are safe for color-blind readers (Okabe and
Ito's palette; viridis and cividis). matplotlib's global settings stay as they are.
"""

import functools
import io
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMN, PAGE = 3.35, 6.9  # inches
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, GRAY = "#CC79A7", "#56B4E9", "#777777"
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GRAY)
MARKERS = "osD^vPX"
DPI = 200  # of a PNG, and of the pictures inside PDF and SVG
STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_name("paper.mplstyle"), use_default_template=False
)

Photo = UInt8[np.ndarray, "height width 3"]


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Runs `draw` under STYLE, lays its figure out, and restores the settings."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*arguments, **options)
            # Laid out once, not again in every format.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose parts make room for each other."""
    return Figure(figsize=(width, height), layout="constrained")


def stacked(
    titles: Collection[str], height: float, *, room: float, loc: Any = "center"
) -> tuple[Figure, list[Axes]]:
    """A figure one column wide with a panel per title, on the same scales.

    Args:
      titles: of the panels, from the top.
      height: of each panel, in inches.
      room: for what else there is in the figure, in inches.
      loc: where the titles are.
    """
    count = len(titles)
    figure = new_figure(COLUMN, room + height * count)
    grid = figure.subplots(count, 1, sharex=True, sharey=True, squeeze=False)
    for ax, title in zip(grid[:, 0], titles, strict=True):
        ax.set_title(title, loc=loc)
    return figure, list(grid[:, 0])


# --- Files ----------------------------------------------------------------------------


def encode(figure: Figure, kind: str, *, dpi: int | None = None) -> bytes:
    """Returns a figure as the bytes of a file; the same figure gives the same bytes.

    Args:
      figure: drawn by a function of this package.
      kind: "png", "pdf" or "svg".
      dpi: dots per inch of a PNG, and of the pictures in the others; None: the
        figure's own, but at least DPI.
    """
    metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        dots = max(figure.dpi, DPI) if dpi is None else dpi
        figure.savefig(file, format=kind, dpi=dots, metadata=metadata)
    return _rounded(file.getvalue()) if kind == "svg" else file.getvalue()


def _rounded(svg: bytes) -> bytes:
    """Two decimals of a point are enough for a path, and half the bytes."""
    return re.sub(
        rb' d="[^"]*"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path[0]), svg
    )


def pixels(figure: Figure) -> Photo:
    """Returns a figure as an RGB array, at the resolution of its PNG."""
    with matplotlib.rc_context(STYLE):
        own, figure.dpi = figure.dpi, max(figure.dpi, DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        figure.dpi = own
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


# --- Axes -----------------------------------------------------------------------------


def block_axis(ax: Axes, depth: int) -> Axes:
    """Numbers the blocks from 0 along x, as many of them as there is room for."""
    ax.set_xlim(-0.8, depth - 0.2)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    ax.set_xlabel("block, from 0")
    return ax


def degree_axis(ax: Axes, label: str) -> Axes:
    """Angles between lines along y: 0 to 90 degrees in every figure."""
    ax.set_ylim(-2, 92)
    ax.set_yticks(range(0, 91, 15))
    ax.set_ylabel(label)
    return ax


def log_axis(ax: Axes) -> Axes:
    """Makes y logarithmic with plain numbers, also where it spans no power of ten."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 30:
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        if high / low < 4:
            ax.yaxis.set_major_locator(ticker.MaxNLocator(4))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    return ax


def series(ax: Axes, values: Mapping[str, Float[np.ndarray, " L"]]) -> Axes:
    """One line per name over the blocks, told apart by color and marker."""
    for i, (name, line) in enumerate(values.items()):
        color, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        ax.plot(line, color=color, marker=marker, label=name)
        block_axis(ax, len(line))
    return ax


def picture(ax: Axes, image: np.ndarray, **options: Any) -> Any:
    """Shows an image without axes or smoothing; returns what a color bar needs."""
    shown = ax.imshow(image, interpolation="nearest", **options)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return shown
