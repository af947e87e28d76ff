"""Pictures of a segmentation: photograph, prediction, truth.

photographs, classes of pixels --scenes--> Figure
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sinder_jax.plots import style
from sinder_jax.plots.style import Photo

PANEL = 1.6  # inches of a photograph's short side
MOST_NAMED = 27  # classes in the legend
IGNORED = (1.0, 1.0, 1.0)
GRAY = (0.5, 0.5, 0.5)  # is ignored where white is a class
EDGE = (0.4, 0.4, 0.4)  # around a color of the legend, which may be white
Palette = Sequence[tuple[int, int, int]]  # RGB, 0 to 255
# Photograph, prediction and mask; each of the photographs has a size of its own.
Shown = tuple[
    UInt8[np.ndarray, "_ _ 3"], UInt8[np.ndarray, "_ _"], UInt8[np.ndarray, "_ _"]
]


@style.styled
def scenes(
    shown: Sequence[Shown], names: Sequence[str] = (), palette: Palette = ()
) -> Figure:
    """A row for each photograph: the photograph, its prediction, its mask.

    Args:
      shown: photograph, prediction, and mask; 255 is ignored.
      names: of the classes; empty: their numbers.
      palette: as for `colored`.
    """
    shapes = [photo.shape[:2] for photo, _, _ in shown]
    tall = [PANEL * height / min(height, width) for height, width in shapes]
    wide = max(PANEL * width / min(height, width) for height, width in shapes)
    present = np.unique(np.concatenate([np.append(p, m) for _, p, m in shown]))
    present = present[present != 255]
    figure = style.new_figure(3 * wide + 1.4, sum(tall) + 0.3)
    panels = figure.subplots(len(shown), 3, squeeze=False, height_ratios=tall)
    for line, (photo, prediction, mask) in zip(panels, shown, strict=True):
        style.picture(line[0], photo)
        style.picture(line[1], colored(prediction, palette))
        style.picture(line[2], colored(mask, palette))
    for ax, title in zip(panels[0], ("photograph", "prediction", "truth"), strict=True):
        ax.set_title(title)
    colors = _colors(palette)
    patches = [
        Patch(
            facecolor=colors[k],
            edgecolor=EDGE,
            linewidth=0.5,
            label=names[k] if names else str(k),
        )
        for k in present[:MOST_NAMED]
    ]
    figure.legend(handles=patches, loc="outside right upper", fontsize=6)
    return figure


def colored(classes: UInt8[np.ndarray, "height width"], palette: Palette = ()) -> Photo:
    """A color for each class, the same in every picture of a data set.

    Args:
      classes: 255 is drawn white, or gray if the palette has a white.
      palette: the data set's own colors, from class 0; empty: colors of this module.
    """
    return np.rint(255 * _colors(palette)[classes]).astype(np.uint8)


def _colors(palette: Palette) -> Float64[np.ndarray, "256 3"]:
    """The palette of a data set, then colors of this module."""
    colors = _COLORS.copy()
    own = np.reshape(palette, (-1, 3)) / 255
    colors[: len(own)] = own
    colors[255] = GRAY if IGNORED in map(tuple, own.tolist()) else IGNORED
    return colors


def _palette() -> np.ndarray:
    """Two palettes of 20 first; beyond them hues at the golden ratio, which recur."""
    twenty = np.arange(20)
    palettes = [matplotlib.colormaps[name](twenty) for name in ("tab20", "tab20b")]
    colors = np.concatenate(palettes)[:, :3]
    hues = np.arange(256 - len(colors)) * 0.61803398875 % 1
    hsv = np.stack([hues, np.full_like(hues, 0.7), 0.5 + 0.4 * hues], axis=-1)
    colors = np.concatenate([colors, matplotlib.colors.hsv_to_rgb(hsv)])
    return colors


_COLORS = _palette()
