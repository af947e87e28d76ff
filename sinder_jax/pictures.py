"""Pictures of tokens, by Pillow and NumPy only: arrays in, 8-bit RGB arrays out.

    norms [H, W] --heat_map--> [H, W, 3] --enlarge--> [height, width, 3]
    photo + mask [H, W] --mask_overlay--> [height, width, 3]
    images --row, stack--> image --save_png--> file        `before_after` does it all

Everything takes and gives plain NumPy arrays (`jax.device_get` makes them), so that a
picture can be drawn beside a running step. Colors are safe for color-blind readers.
"""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

RGB = UInt8[np.ndarray, "_height _width 3"]

# Nine colors of the viridis map (dark blue to yellow, lightness rising evenly; by
# S. van der Walt and N. Smith, released as CC0), evenly spaced; linear in between.
_HEAT_COLORS = np.array(
    [
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (40, 174, 128),
        (94, 201, 98),
        (173, 220, 48),
        (253, 231, 37),
    ],
    np.float64,
)
_NOT_FINITE = (190, 190, 190)  # gray is not on the scale above
_MASKED = (213, 94, 0)  # vermilion of Okabe and Ito's color-blind-safe palette
_TEXT = (34, 34, 34)
_FAINT_TEXT = (110, 110, 110)
_WHITE = (255, 255, 255)

_MIN_PANEL = 400  # pixels; smaller photographs are enlarged to be seen well


class TokenMaps(NamedTuple):
    """What there is to see of one image's patch tokens.

    Attributes:
      pca: principal components as colors, from `analysis.pca_rgb`.
      norms: norm of every token.
      mask: True where a token is an outlier.
    """

    pca: UInt8[np.ndarray, "H W 3"]
    norms: Float[np.ndarray, "H W"]
    mask: Bool[np.ndarray, "H W"]


# --- Arrays to colors -----------------------------------------------------------------


def heat_map(values: Float[np.ndarray, "H W"], vmin: float, vmax: float) -> RGB:
    """Colors values from dark blue (`vmin` and below) to yellow (`vmax` and above).

    Maps to be compared need the same `vmin` and `vmax`. What is not finite is gray.
    """
    share = np.clip((values - vmin) / max(vmax - vmin, 1e-12), 0, 1)
    position = np.where(np.isfinite(share), share, 0) * (len(_HEAT_COLORS) - 1)
    below = np.minimum(position.astype(int), len(_HEAT_COLORS) - 2)
    weight = (position - below)[..., None]
    colors = (1 - weight) * _HEAT_COLORS[below] + weight * _HEAT_COLORS[below + 1]
    colors[~np.isfinite(values)] = _NOT_FINITE
    return np.rint(colors).astype(np.uint8)


def color_bar(vmin: float, vmax: float, height: int, font_size: int = 20) -> RGB:
    """Draws the scale of `heat_map`, upright and with numbers at its right.

    Args:
      vmin: value of the lowest color.
      vmax: value of the highest color.
      height: pixels of the whole picture.
      font_size: pixels; the bar is as wide.
    """
    ramp = np.linspace(vmax, vmin, height)[:, None].repeat(font_size, axis=1)
    ticks = _ticks(vmin, vmax)
    texts = [f"{tick:,.10g}" for tick in ticks]
    dash = font_size // 3
    width = max(_text_size(text, font_size)[0] for text in texts)
    canvas = Image.new("RGB", (font_size + 2 * dash + width, height), _WHITE)
    canvas.paste(Image.fromarray(heat_map(ramp, vmin, vmax)))
    draw = ImageDraw.Draw(canvas)
    line = max(1, font_size // 14)
    for tick, text in zip(ticks, texts, strict=True):
        share = (vmax - tick) / max(vmax - vmin, 1e-12)
        y = round(share * (height - 1))
        draw.line((font_size, y, font_size + dash, y), fill=_TEXT, width=line)
        # Numbers at the ends stay inside the picture.
        middle = min(max(y, font_size // 2), height - 1 - font_size // 2)
        draw.text(
            (font_size + 2 * dash, middle),
            text,
            fill=_TEXT,
            font=_font(font_size),
            anchor="lm",
        )
    return np.asarray(canvas)


def _ticks(vmin: float, vmax: float, about: int = 6) -> list[float]:
    """Round numbers from vmin to vmax: multiples of 1, 2 or 5 times a power of ten."""
    if not vmax > vmin:
        return [vmin]
    rough = (vmax - vmin) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(vmin / step - 1e-9), math.floor(vmax / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def mask_overlay(photo: RGB, mask: Bool[np.ndarray, "H W"]) -> RGB:
    """Fades a photograph to pale gray and paints the masked patches vermilion.

    Args:
      photo: its sides are the mask's times one whole number, the patch size.
      mask: True where a patch is to be seen.

    Raises:
      ValueError: the sides do not fit.
    """
    patch_size = photo.shape[0] // mask.shape[0]
    if photo.shape[:2] != (mask.shape[0] * patch_size, mask.shape[1] * patch_size):
        raise ValueError(
            f"a mask of {mask.shape[0]} x {mask.shape[1]} patches does not fit a "
            f"photograph of {photo.shape[0]} x {photo.shape[1]} pixels"
        )
    gray = np.asarray(Image.fromarray(photo).convert("L"), np.float64)
    faded = np.rint(0.55 * 255 + 0.45 * gray).astype(np.uint8)
    overlay = np.repeat(faded[..., None], 3, axis=2)
    # A seam of photograph around each patch, so that neighbors can be counted.
    seam = patch_size // 14
    square = np.pad(np.ones([patch_size - 2 * seam] * 2, bool), seam)
    overlay[np.kron(mask, square)] = _MASKED
    return overlay


def enlarge(patches_image: UInt8[np.ndarray, "H W 3"], patch_size: int) -> RGB:
    """Makes every patch a square of `patch_size` pixels, without smoothing."""
    return patches_image.repeat(patch_size, axis=0).repeat(patch_size, axis=1)


# --- Composition ----------------------------------------------------------------------


def row(
    images: Sequence[RGB],
    labels: Sequence[str] | None = None,
    *,
    gap: int = 12,
    font_size: int = 20,
) -> RGB:
    """Puts images side by side on white, tops aligned.

    Args:
      images: at least one, of any sizes.
      labels: one above each image, centered; "" for none.
      gap: pixels between neighbors.
      font_size: pixels.
    """
    columns = [np.asarray(image) for image in images]
    if labels is not None:
        columns = [
            stack([_label(text, image.shape[1], font_size), image], gap=gap // 2)
            for text, image in zip(labels, columns, strict=True)
        ]
    height = max(image.shape[0] for image in columns)
    width = sum(image.shape[1] for image in columns) + gap * (len(columns) - 1)
    canvas = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for image in columns:
        canvas[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1] + gap
    return canvas


def stack(
    images: Sequence[RGB],
    labels: Sequence[str] | None = None,
    *,
    gap: int = 12,
    font_size: int = 20,
) -> RGB:
    """Puts images below each other on white, left sides aligned.

    Args:
      images: at least one, of any sizes.
      labels: one at the left of each image, reading upwards; "" for none. A second
        line, after a line break, is set in gray.
      gap: pixels between neighbors.
      font_size: pixels.
    """
    rows = [np.asarray(image) for image in images]
    if labels is not None:
        sides = [
            _side_label(text, image.shape[0], font_size)
            for text, image in zip(labels, rows, strict=True)
        ]
        width = max(side.shape[1] for side in sides)  # so that images stay aligned
        rows = [
            row([_pad_left(side, width), image], gap=gap // 2)
            for side, image in zip(sides, rows, strict=True)
        ]
    # A column is a row seen along the diagonal.
    return row([image.swapaxes(0, 1) for image in rows], gap=gap).swapaxes(0, 1)


def _label(text: str, width: int, font_size: int) -> RGB:
    """One line of text, centered, on an image at least `width` pixels wide."""
    width = max(width, _text_size(text, font_size)[0])
    canvas = Image.new("RGB", (width, round(1.3 * font_size)), _WHITE)
    _draw_centered(canvas, text, font_size, _TEXT)
    return np.asarray(canvas)


def _side_label(text: str, height: int, font_size: int) -> RGB:
    first, _, second = text.partition("\n")
    lines = [_label(first, height, font_size)]
    if second:
        canvas = Image.new("RGB", (height, round(1.1 * font_size)), _WHITE)
        _draw_centered(canvas, second, round(0.8 * font_size), _FAINT_TEXT)
        lines.append(np.asarray(canvas))
    return np.rot90(stack(lines, gap=0))


def _pad_left(image: RGB, width: int) -> RGB:
    missing = width - image.shape[1]
    return np.pad(image, ((0, 0), (missing, 0), (0, 0)), constant_values=255)


def _draw_centered(
    canvas: Image.Image, text: str, font_size: int, color: tuple[int, int, int]
) -> None:
    middle = (canvas.width / 2, canvas.height / 2)
    ImageDraw.Draw(canvas).text(
        middle, text, fill=color, font=_font(font_size), anchor="mm"
    )


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels hold FreeType"
    return font


def _text_size(text: str, font_size: int) -> tuple[int, int]:
    left, top, right, bottom = _font(font_size).getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)


# --- Figures --------------------------------------------------------------------------


def before_after(photo: RGB, before: TokenMaps, after: TokenMaps) -> RGB:
    """Draws one image's tokens before the repair and now, in two rows.

    Columns: photograph, PCA, norms on one shared scale with its bar, outliers.

    Args:
      photo: what the model saw, a whole number of patches high and wide.
      before: of the model as it was.
      after: of the model as it is, with the same grid.

    Raises:
      ValueError: the maps do not fit the photograph.
    """
    return token_figure(photo, {"before": before, "now": after})


def token_figure(photo: RGB, rows: dict[str, TokenMaps]) -> RGB:
    """Draws one image's tokens, a labeled row for each model; see `before_after`."""
    patch_size = photo.shape[0] // next(iter(rows.values())).mask.shape[0]
    zoom = max(1, math.ceil(_MIN_PANEL / min(photo.shape[:2])))
    photo = _zoom_photo(photo, zoom)
    patch_size *= zoom
    font_size = round(min(photo.shape[:2]) / 18)
    gap = font_size // 2
    maps = list(rows.values())
    finite = [m.norms[np.isfinite(m.norms)] for m in maps]
    vmax = float(np.max(np.concatenate(finite), initial=0.0))

    def column(images: Iterable[RGB]) -> RGB:
        return stack(list(images), gap=gap)

    norms = column(enlarge(heat_map(m.norms, 0.0, vmax), patch_size) for m in maps)
    columns = {
        " ": column(
            _side_label(f"{name}\n{caption(m)}", photo.shape[0], font_size)
            for name, m in rows.items()
        ),
        "photograph": column(photo for _ in maps),
        "PCA of tokens": column(enlarge(m.pca, patch_size) for m in maps),
        "token norm": norms,
        "": color_bar(0.0, vmax, norms.shape[0], round(0.75 * font_size)),
        "outliers": column(mask_overlay(photo, m.mask) for m in maps),
    }
    figure = row(list(columns.values()), list(columns), gap=gap, font_size=font_size)
    return np.pad(figure, ((gap, gap), (gap, gap), (0, 0)), constant_values=255)


def caption(maps: TokenMaps) -> str:
    """Says in a few words how many outliers there are and how large the norms get."""
    count = int(maps.mask.sum())
    ratio = float(np.max(maps.norms) / np.median(maps.norms))
    outliers = "1 outlier" if count == 1 else f"{count} outliers"
    return f"{outliers}, max norm {ratio:.1f} x median"


def _zoom_photo(photo: RGB, zoom: int) -> RGB:
    image = Image.fromarray(photo)
    sides = (image.width * zoom, image.height * zoom)
    return np.asarray(image.resize(sides, Image.Resampling.BICUBIC))


# --- Files ----------------------------------------------------------------------------


def save_png(path: str | os.PathLike, image: RGB) -> None:
    """Writes a PNG whole or not at all: under another name first, then renamed.

    Args:
      path: its folder must exist; a file of that name is replaced.
      image: RGB.

    Raises:
      OSError: the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            Image.fromarray(image).save(file, format="PNG")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
