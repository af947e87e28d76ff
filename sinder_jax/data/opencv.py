"""What OpenCV does to 8-bit images, in NumPy: bilinear resize, hue and saturation.

    RGB --resize--> RGB    mask --resize_nearest--> mask
    RGB --to_hsv--> hue (0 to 179), saturation, value --from_hsv--> RGB

mmsegmentation reads and changes images by OpenCV, whose integer arithmetic is followed
here: Pillow antialiases, and rounds colors elsewhere. Checked against OpenCV 4.10.
"""

import numpy as np
from jaxtyping import UInt8

Pixels = UInt8[np.ndarray, "height width 3"]
SHARE_BITS = 11  # of the fixed-point weights of a resize
TABLE_BITS = 12  # of the fixed-point divisions of a color


# --- Resizing -------------------------------------------------------------------------


def resize(
    image: Pixels, size: tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Bilinear, without antialiasing: `cv2.resize` with INTER_LINEAR.

    Args:
      image: 8 bits.
      size: (height, width) in pixels.
    """
    top, bottom, below = _neighbors(image.shape[0], size[0])
    left, right, beside = _neighbors(image.shape[1], size[1])
    pixels = image.astype(np.int32)
    one = 1 << SHARE_BITS
    across = pixels[:, left] * (one - beside)[None, :, None]
    across += pixels[:, right] * beside[None, :, None]
    # The upper sum and the lower one are cut to 16 bits one after the other.
    across >>= 4
    upper = (across[top] * (one - below)[:, None, None]) >> 16
    lower = (across[bottom] * below[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _neighbors(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels that each output lies between, and the weight of the second."""
    scale = old / new
    centers = ((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(centers).astype(np.int32)
    # Beyond an edge both neighbors are the edge's.
    weights = np.rint((centers - first) * np.float32(1 << SHARE_BITS)).astype(np.int32)
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), weights


def resize_nearest(
    mask: UInt8[np.ndarray, "height width"], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width"]:
    """`cv2.resize` with INTER_NEAREST: the pixel at floor(j·old/new)."""
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(int), old - 1)
        for old, new in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns[None, :]]


# --- Colors ---------------------------------------------------------------------------


def _reciprocals(factor: float) -> np.ndarray:
    values = np.arange(256, dtype=np.float64)
    values[0] = np.inf
    return np.rint(factor * (1 << TABLE_BITS) / values).astype(np.int32)


_SATURATION, _HUE = _reciprocals(255.0), _reciprocals(180 / 6)


def to_hsv(image: Pixels) -> Pixels:
    """`cv2.cvtColor` from RGB to HSV: hue in units of 2°, 0 to 179."""
    red, green, blue = np.moveaxis(image.astype(np.int32), -1, 0)
    value = image.max(axis=-1).astype(np.int32)
    spread = value - image.min(axis=-1)
    half = 1 << (TABLE_BITS - 1)
    saturation = (spread * _SATURATION[value] + half) >> TABLE_BITS
    sector = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * _HUE[spread] + half) >> TABLE_BITS
    hue += np.where(hue < 0, 180, 0)
    return np.stack([hue, saturation, value], axis=-1).astype(np.uint8)


def from_hsv(image: Pixels) -> Pixels:
    """`cv2.cvtColor` from HSV to RGB.

    Rounds down, as OpenCV's vector code does. At the end of the image, where fewer
    pixels are left than a vector has, OpenCV rounds to the nearest instead.
    """
    hue, saturation, value = np.moveaxis(image.astype(np.float32), -1, 0)
    saturation, value = (x * np.float32(1 / 255) for x in (saturation, value))
    hue = hue * np.float32(6 / 180)
    sector = np.floor(hue)
    part = hue - sector
    levels = np.stack(
        [
            value,
            value * (1 - saturation),
            value * _less_product(saturation, part),
            value * _less_product(saturation, 1 - part),
        ],
        axis=-1,
    )
    order = _CHANNELS[sector.astype(np.intp)]
    colors = np.take_along_axis(levels, order, axis=-1)
    return (colors * np.float32(255)).astype(np.uint8)


def _less_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 − x·y, rounded once, as by a fused multiply-add."""
    return (1 - x.astype(np.float64) * y).astype(np.float32)


# Red, green and blue in each of the six sectors of hue, of the four `levels`.
_CHANNELS = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])
