"""Pictures of photographs' tokens, model by model: PCA, norms, outliers.

photograph, `defective.TokenMaps` by model --token_rows--> Figure
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle

from sinder_jax.analysis import defective
from sinder_jax.analysis.defective import TokenMaps
from sinder_jax.plots import style
from sinder_jax.plots.style import DPI, GRAY, VERMILION, Photo

PANEL = 2.1  # inches of a photograph's short side
NORMS = matplotlib.colormaps["viridis"].with_extremes(bad="silver")


@style.styled
def token_rows(looks: Sequence[tuple[Photo, Mapping[str, TokenMaps]]]) -> Figure:
    """Draws the tokens of one or more photographs, a labeled row for each model.

    Columns: photograph, PCA, norms with their color bar, outliers. The norms of one
    photograph share a scale; those of different photographs do not. The resolution is
    such that no photograph loses pixels.

    Args:
      looks: what the models saw, a whole number of patches high and wide; and the maps
        of its tokens by the model's name, such as "before" and "now".

    Raises:
      ValueError: maps do not fit their photograph.
    """
    shapes = [photo.shape[:2] for photo, _ in looks]
    tall = [PANEL * height / min(height, width) for height, width in shapes]
    wide = max(PANEL * width / min(height, width) for height, width in shapes)
    heights = [0.3 + len(looks[i][1]) * (tall[i] + 0.05) for i in range(len(looks))]
    figure = style.new_figure(4 * wide + 1.1, sum(heights))
    figure.set_dpi(max(DPI, *(min(shape) / PANEL for shape in shapes)))
    parts = figure.subfigures(len(looks), 1, height_ratios=heights, squeeze=False)
    for (part,), (photo, rows) in zip(parts, looks, strict=True):
        _draw_rows(part, photo, rows)
    return figure


def _draw_rows(part: FigureBase, photo: Photo, rows: Mapping[str, TokenMaps]) -> None:
    panels = part.subplots(len(rows), 4, squeeze=False)
    finite = [maps.norms[np.isfinite(maps.norms)] for maps in rows.values()]
    scale = {"vmin": 0.0, "vmax": np.concatenate(finite).max(initial=0.0) or 1.0}
    for line, (name, maps) in zip(panels, rows.items(), strict=True):
        style.picture(line[0], photo)
        style.picture(line[1], maps.pca)
        norms = style.picture(line[2], maps.norms, cmap=NORMS, **scale)
        outliers(line[3], photo, maps.mask)
        line[0].set_ylabel(defective.describe(maps), fontsize=7, color=GRAY)
        beside = {"textcoords": "offset points", "rotation": 90, "va": "center"}
        line[0].annotate(
            name, (0, 0.5), (-15, 0), xycoords="axes fraction", ha="right", **beside
        )
    titles = ("photograph", "PCA of tokens", "token norm", "outliers")
    for ax, title in zip(panels[0], titles, strict=True):
        ax.set_title(title)
    part.colorbar(norms, ax=panels[:, 2], aspect=20 * len(rows), pad=0.03)


def outliers(ax: Axes, photo: Photo, mask: Bool[np.ndarray, "H W"]) -> Axes:
    """Fades a photograph to pale gray and paints the masked patches vermilion.

    Args:
      ax: to draw on.
      photo: its sides are the mask's times one whole number, the patch size.
      mask: True where a patch is painted.

    Raises:
      ValueError: the sides do not fit.
    """
    rows, columns = mask.shape
    patch_size = photo.shape[0] // rows
    if photo.shape[:2] != (rows * patch_size, columns * patch_size):
        raise ValueError(
            f"a mask of {rows} x {columns} patches does not fit a photograph of "
            f"{photo.shape[0]} x {photo.shape[1]} pixels"
        )
    gray = photo @ np.array([0.299, 0.587, 0.114])  # luma, as Pillow has it
    extent = (0, columns, rows, 0)
    style.picture(ax, gray, cmap="gray", vmin=0, vmax=255, alpha=0.45, extent=extent)
    # A seam of photograph around each patch, so that neighbors can be counted.
    squares = [
        Rectangle((x + 0.07, y + 0.07), 0.86, 0.86) for y, x in np.argwhere(mask)
    ]
    ax.add_collection(PatchCollection(squares, color=VERMILION, lw=0))
    return ax
