"""One random training crop of a photograph and its mask, as mmsegmentation 0.27.

    pixels, mask, draws --resize, crop, flip, colors--> Crop, at most size × size
    Crop --normalize, pad--> float image of whole patches, int labels

The random numbers are other ones than mmsegmentation's, with the same distributions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from sinder_jax.data import decode, opencv
from sinder_jax.data.augment import Draws
from sinder_jax.data.masks import IGNORE, Mask
from sinder_jax.data.opencv import Pixels
from sinder_jax.families import Statistics

MOST_OF_ONE = 0.75  # share of the valid pixels that one class may cover
TRIES = 10  # crops that are drawn anew because one class covers more
BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # of 180


class Crop(NamedTuple):
    """Part of a photograph and of its mask, of the same size."""

    pixels: Pixels
    mask: Mask


class Examples(NamedTuple):
    """B examples to train on.

    Attributes:
      images: normalized; zeros around the crop.
      labels: classes; 255 where there is none, and where the crop was padded.
    """

    images: Float32[np.ndarray, "B padded padded 3"]
    labels: Int32[np.ndarray, "B size size"]


def random_crop(
    pixels: Pixels,
    mask: Mask,
    draws: Draws,
    *,
    size: int,
    ratios: tuple[float, float],
) -> Crop:
    """Resizes by a random ratio, crops, mirrors and changes the colors.

    Args:
      pixels: the photograph, RGB.
      mask: of the same size.
      draws: of this example.
      size: pixels of the crop, and of the short side at ratio 1.
      ratios: least and greatest ratio.

    Returns:
      `size` × `size` pixels, or less where the resized photograph is smaller.
    """
    short = int(size * draws.uniform(*ratios))
    height, width = mask.shape
    resized = resized_to(height, width, short)
    pixels, mask = opencv.resize(pixels, resized), opencv.resize_nearest(mask, resized)
    box = _box(mask, size, draws)
    pixels, mask = pixels[box], mask[box]
    if draws.chance():
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    return Crop(distorted(pixels, draws), np.ascontiguousarray(mask))


def resized_to(height: int, width: int, short: int) -> tuple[int, int]:
    """(height, width) with the short side `short`; mmcv's `rescale_size`."""
    scale = short / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _box(mask: Mask, size: int, draws: Draws) -> tuple[slice, slice]:
    """Where to crop; `RandomCrop`, with `cat_max_ratio`."""
    for _ in range(TRIES + 1):
        rows, columns = (
            _span(draws.below(max(side - size, 0) + 1), size) for side in mask.shape
        )
        if is_mixed(mask[rows, columns]):
            break
    return rows, columns


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


def is_mixed(mask: Mask) -> bool:
    """True if no class covers `MOST_OF_ONE` of the valid pixels or more."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return bool(counts.max() < MOST_OF_ONE * counts.sum())


# --- Colors ---------------------------------------------------------------------------


def distorted(pixels: Pixels, draws: Draws) -> Pixels:
    """Random brightness, contrast, saturation and hue; `PhotoMetricDistortion`.

    Each with probability ½, and cut to 8 bits after each. Contrast comes second or
    last.
    """
    if draws.chance():
        pixels = _scaled(pixels, 1.0, draws.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = draws.chance()
    if contrast_first:
        pixels = _contrast(pixels, draws)
    if draws.chance():
        hsv = opencv.to_hsv(pixels)
        hsv[..., 1] = _scaled(hsv[..., 1], draws.uniform(*SATURATION))
        pixels = opencv.from_hsv(hsv)
    if draws.chance():
        hsv = opencv.to_hsv(pixels)
        turn = draws.below(2 * HUE) - HUE  # their upper end is not drawn
        hsv[..., 0] = (hsv[..., 0].astype(int) + turn) % 180
        pixels = opencv.from_hsv(hsv)
    if not contrast_first:
        pixels = _contrast(pixels, draws)
    return np.ascontiguousarray(pixels)


def _contrast(pixels: Pixels, draws: Draws) -> Pixels:
    return _scaled(pixels, draws.uniform(*CONTRAST)) if draws.chance() else pixels


def _scaled(values: np.ndarray, gain: float, shift: float = 0.0) -> np.ndarray:
    found = values.astype(np.float32) * np.float32(gain) + np.float32(shift)
    return np.clip(found, 0, 255).astype(np.uint8)


# --- Batches --------------------------------------------------------------------------


def collate(
    crops: Sequence[Crop], size: int, padding: tuple[int, int], statistics: Statistics
) -> Examples:
    """Normalizes, and pads: crops to `size` at the right and at the bottom, then all.

    Args:
      crops: of at most size × size pixels.
      size: pixels.
      padding: zeros before and after each axis that make it whole patches, of
        `segmentation.center_padding`.
      statistics: of the images that the model was trained on.
    """
    padded, before = size + sum(padding), padding[0]
    images = np.zeros((len(crops), padded, padded, 3), np.float32)
    labels = np.full((len(crops), size, size), IGNORE, np.int32)
    for image, label, crop in zip(images, labels, crops, strict=True):
        height, width = crop.mask.shape
        inside = np.s_[before : before + height, before : before + width]
        image[inside] = decode.normalize(crop.pixels, statistics)
        label[:height, :width] = crop.mask
    return Examples(images, labels)
