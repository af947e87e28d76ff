"""Masks: images whose pixels are class numbers instead of colors.

file --read--> 8-bit class numbers, 255 where a pixel has none
published numbers --counted_from 1 or 7--> class 0 is 0, lower numbers are none
"""

import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sinder_jax.data import decode

Mask = UInt8[np.ndarray, "height width"]
IGNORE = 255
LOSSY = ("JPEG", "AVIF")
MOST_CLASSES = IGNORE


def read(source: str | os.PathLike | bytes, name: str) -> Mask:
    """Decodes a mask; the numbers of a palette image are those of its colors.

    Args:
      source: path of a local file, or the bytes of a file.
      name: of the mask in messages.

    Raises:
      UnreadableImage: as `decode.read_rgb`; or the file holds colors instead of class
        numbers, numbers above 255, or is of a format that changes numbers.
    """
    with decode.opened(source, name) as image:
        if image.format in LOSSY:
            raise ValueError(
                f"a {image.format}, which changes the numbers of a mask; save masks as "
                "PNG"
            )
        return _numbers(image)


def _numbers(image: Image.Image) -> Mask:
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    numbers = np.asarray(image)
    if image.mode in ("RGB", "RGBA"):  # gray that was saved as colors
        colors = numbers[..., :3]
        if (colors != colors[..., :1]).any():
            raise ValueError(
                "a mask of colors; expected one channel with the number of the class, "
                f"0 to {MOST_CLASSES - 1}, and {IGNORE} for pixels to ignore"
            )
        return np.ascontiguousarray(colors[..., 0])
    if image.mode not in ("P", "L") and not image.mode.startswith("I"):
        raise ValueError(
            f"a mask of mode {image.mode}; expected one channel of class numbers"
        )
    if numbers.size and not 0 <= numbers.min() <= numbers.max() <= IGNORE:
        raise ValueError(
            f"a mask with the number {numbers.max()}; expected classes 0 to "
            f"{MOST_CLASSES - 1}, and {IGNORE} for pixels to ignore"
        )
    return numbers.astype(np.uint8)


def counted_from(mask: Mask, first: int) -> Mask:
    """Counts the classes from 0 where a file counts them from `first`.

    Numbers below `first` are ignored, and 255 stays 255. From 1, this is
    mmsegmentation's `reduce_zero_label`.
    """
    if not first:
        return mask
    none = (mask < first) | (mask == IGNORE)
    return np.where(none, IGNORE, mask - np.uint8(first)).astype(np.uint8)


def largest(mask: Mask) -> int:
    """The largest label but 255; -1 if there is none."""
    labels = mask[mask != IGNORE]
    return int(labels.max()) if labels.size else -1
