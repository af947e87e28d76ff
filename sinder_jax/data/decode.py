"""One picture: file -> RGB -> resized and cut to whole patches -> normalized.

    file --read_rgb--> RGB --training_crop | training_keep | visual_resize--> RGB
    RGB --normalize--> float32 array --to_uint8--> the same pixels

Sizes follow torchvision's arithmetic on PIL images, which the authors used.
"""

import io
import math
import os

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from sinder_jax.families import Statistics

MAX_ASPECT = 100  # long side / short side; beyond it one resized image fills gigabytes

# Width and height of the shapes that `training_keep` cuts to: what cameras make, and so
# few that a step is compiled seven times at most.
ASPECTS = ((1, 2), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (2, 1))

# What Pillow may try on a file, whatever its name: ImageNet holds a PNG called .JPEG.
# Formats that start another program (EPS runs Ghostscript) stay out.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


class UnreadableImage(ValueError):
    """A file that holds no image Pillow can decode whole. The message names it."""


# --- Reading --------------------------------------------------------------------------


def read_rgb(
    source: str | os.PathLike | bytes, *, name: str | None = None
) -> Image.Image:
    """Decodes a file to 8-bit RGB at full size.

    EXIF rotation is not applied and JPEGs are never decoded at reduced size, as in the
    authors' loader. Transparent pixels are laid over white; 16-bit samples keep their
    high byte; grayscale, palette and CMYK images are converted by Pillow.

    Args:
      source: path of a local file, or the bytes of a file.
      name: what messages call it; None means the path.

    Raises:
      UnreadableImage: the file is missing, truncated, not an image, larger than
        Pillow's limit against decompression bombs (about 179 million pixels), more
        than `MAX_ASPECT` times longer than wide or the reverse, or of 32-bit
        samples, whose range is unknown.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    name = name or ("image" if isinstance(file, io.BytesIO) else os.fspath(file))
    try:
        with Image.open(file, formats=_FORMATS) as image:
            _check_aspect(image)
            return _to_rgb(image)
    except MemoryError:
        raise  # of this machine, not of the file
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None
    except UnidentifiedImageError as error:
        reason = f"not an image in one of the formats {', '.join(_FORMATS)}"
        raise UnreadableImage(f"{name}: {reason}") from error
    except Exception as error:
        # Decoders meet a broken file with OSError, SyntaxError, struct.error, and more.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(f"{name}: {reason}") from error


def _check_aspect(image: Image.Image) -> None:
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise UnreadableImage(
            f"one side of {image.width} x {image.height} pixels is more than "
            f"{MAX_ASPECT} times the other"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UnreadableImage(
            f"32-bit samples (mode {image.mode}) have no agreed range; "
            "save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):
        high_byte = (np.asarray(image) // 256).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


# --- Resizing, cropping ---------------------------------------------------------------


def training_crop(image: Image.Image, size: int, *, patch_size: int) -> Image.Image:
    """Resizes the short side to `size` and cuts the middle square out.

    This is torchvision's `Resize(size, BICUBIC)` and `CenterCrop(size)` on a PIL image:
    Pillow's bicubic filter (antialiased), the long side rounded down, the crop placed
    at half the surplus, rounded half to even.

    Args:
      image: RGB, any size.
      size: pixels, a multiple of `patch_size`.
      patch_size: pixels per patch side.

    Returns:
      RGB, `size` × `size` pixels.

    Raises:
      ValueError: `size` is no whole number of patches.
    """
    check_side("size", size, patch_size)
    image = _resize_short_side(image, size)
    return _center_crop(image, (size, size))


def training_keep(image: Image.Image, size: int, *, patch_size: int) -> Image.Image:
    """Resizes and cuts to the one of seven shapes whose aspect is nearest.

    Where `training_crop` drops what is outside the middle square, this keeps nearly the
    whole picture. The authors' code has no such option.

    Args:
      image: RGB, any size.
      size: pixels of the short side, a multiple of `patch_size`.
      patch_size: pixels per patch side.

    Returns:
      RGB of the shape in `buckets` whose aspect is nearest (their ratio, so that 2:1 is
      as far from 1:1 as 1:2 is), resized as `training_crop` to just cover it and cut
      around the middle. A picture nearest to the square gives `training_crop`'s.

    Raises:
      ValueError: `size` is no whole number of patches.
    """
    aspect = math.log(image.width / image.height)
    width, height = min(
        buckets(size, patch_size),
        key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - aspect),
    )
    if image.width * height >= image.height * width:  # longer than the bucket
        sides = (image.width * height // image.height, height)
    else:
        sides = (width, image.height * width // image.width)
    image = image.resize(sides, Image.Resampling.BICUBIC)
    return _center_crop(image, (width, height))


def buckets(size: int, patch_size: int) -> list[tuple[int, int]]:
    """The shapes of `training_keep`: (width, height) in pixels for each of `ASPECTS`.

    The short side is `size`, the long one rounded to whole patches; small sizes may
    give the same shape twice.

    Raises:
      ValueError: `size` is no whole number of patches.
    """
    check_side("size", size, patch_size)
    patches = size // patch_size
    sides = [
        (patches * width / min(width, height), patches * height / min(width, height))
        for width, height in ASPECTS
    ]
    return [
        (round(width) * patch_size, round(height) * patch_size)
        for width, height in sides
    ]


def visual_resize(
    image: Image.Image,
    short_side: int,
    *,
    patch_size: int,
    max_side: int = 1792,
) -> Image.Image:
    """Resizes the short side and keeps the aspect, for pictures to look at.

    The authors' visualization: no crop but what is needed on the right and at the
    bottom, to leave whole patches and at most `max_side` pixels.

    Args:
      image: RGB, any size.
      short_side: pixels, a multiple of `patch_size`; the authors' figures use 518,
        and 896 during training.
      patch_size: pixels per patch side.
      max_side: pixels, a multiple of `patch_size`.

    Returns:
      RGB, both sides multiples of `patch_size`.

    Raises:
      ValueError: `short_side` or `max_side` is no whole number of patches.
    """
    check_side("short_side", short_side, patch_size)
    check_side("max_side", max_side, patch_size)
    image = _resize_short_side(image, short_side)
    width, height = (
        min(side // patch_size * patch_size, max_side) for side in image.size
    )
    return image.crop((0, 0, width, height))


def check_side(name: str, side: int, patch_size: int) -> None:
    """Raises ValueError, with sizes near it, unless `side` is whole patches."""
    if side > 0 and side % patch_size == 0:
        return
    below = max(1, side // patch_size) * patch_size
    raise ValueError(
        f"{name} is {side} pixels, and must be a multiple of the patch size "
        f"{patch_size}, such as {below} or {below + patch_size}"
    )


def _center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    width, height = size
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    short, long = sorted(image.size)
    new_long = int(size * long / short)
    portrait = image.width <= image.height
    sides = (size, new_long) if portrait else (new_long, size)
    return image.resize(sides, Image.Resampling.BICUBIC)


# --- Pixels to numbers ----------------------------------------------------------------


def normalize(
    image: Image.Image | UInt8[np.ndarray, "height width 3"], statistics: Statistics
) -> Float32[np.ndarray, "height width 3"]:
    """Scales RGB pixels to 0 to 1, then to mean 0 and deviation 1 per color.

    Args:
      image: 8-bit RGB.
      statistics: of the images that the model was trained on.
    """
    pixels = np.asarray(image).astype(np.float32)
    # Rows of all three colors at once: twenty times as fast as innermost axes of 3.
    rows = pixels.reshape(len(pixels), -1)
    rows /= np.float32(255)
    mean, std = np.asarray(statistics, np.float32)
    rows -= np.tile(mean, pixels.shape[1])
    rows /= np.tile(std, pixels.shape[1])
    return rows.reshape(pixels.shape)


def to_uint8(
    normalized: Float32[np.ndarray, "height width 3"], statistics: Statistics
) -> UInt8[np.ndarray, "height width 3"]:
    """Undoes `normalize` exactly."""
    mean, std = np.asarray(statistics, np.float32)
    pixels = (normalized * std + mean) * np.float32(255)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
