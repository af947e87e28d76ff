"""One photograph: decoded, resized, cut to whole patches, normalized.

    file --read_rgb--> RGB --training_crop | training_keep | visual_resize--> RGB
    RGB --normalize--> float32 array

Sizes follow torchvision's arithmetic on PIL images, as in the authors' code.
"""

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError, features

from sinder_jax.families import Statistics

MAX_ASPECT = 100  # long side / short side; beyond it one resized image fills gigabytes
MAX_SIDE = 1792  # pixels of a picture to look at, as in the authors' visualization
LARGEST_SIDE = 4096  # pixels of the short side; a mistyped one would fill all memory

# Width and height of the shapes that `training_keep` cuts to: the usual ones of
# cameras, and so few that a step is compiled at most seven times.
ASPECTS = ((1, 2), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (2, 1))

# What is found in a folder (in any case) and decoded. Pillow may try all formats on any
# file, for ImageNet has a PNG called .JPEG; but none that starts another program (EPS
# runs Ghostscript).
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    **({"AVIF": (".avif",)} if features.check("avif") else {}),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# An honest photograph has a byte for every few pixels. A file that promises far more is
# damaged or a decompression bomb, and is refused before memory is taken for it.
SMALL = 6_000_000  # pixels that any file may hold
MOST_PIXELS_PER_BYTE = 64

BAND = 256  # rows that are put on white at a time


# Pillow warns of broken EXIF and of large pictures, which are decoded all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(ValueError):
    """Pillow cannot decode all of a file. The message names the file."""


# --- Reading --------------------------------------------------------------------------


def read_rgb(
    source: str | os.PathLike | bytes, *, name: str | None = None, upright: bool = False
) -> Image.Image:
    """Decodes a file to 8-bit RGB at full size; of an animation, the first picture.

    As in the authors' loader, JPEGs are decoded at full size and EXIF rotation is
    ignored. Transparent images are put on white, 16-bit samples keep their high byte,
    and Pillow converts grayscale, palette and CMYK images.

    Args:
      source: path of a local file, or the bytes of a file.
      name: of the image in messages; None means the path.
      upright: True turns the picture as its EXIF rotation says, for people to look at.

    Raises:
      UnreadableImage: the file is missing, truncated, or not an image; exceeds Pillow's
        limit against decompression bombs (about 179 million pixels), or has more than
        `MOST_PIXELS_PER_BYTE`; has one side more than `MAX_ASPECT` times the other; or
        has samples whose range is unknown.
    """
    if name is None:
        name = "image" if isinstance(source, bytes) else os.fspath(source)
    with opened(source, name) as image:
        if upright:
            _turn(image)
        return _to_rgb(image)


@contextmanager
def opened(source: str | os.PathLike | bytes, name: str) -> Iterator[Image.Image]:
    """Yields the decoded image of a file in its own mode; errors as `read_rgb`.

    What the block raises counts as an error of the file.
    """
    with _header(source, name) as image:
        image.load()
        yield image


@contextmanager
def _header(source: str | os.PathLike | bytes, name: str) -> Iterator[Image.Image]:
    try:
        num_bytes = len(source) if isinstance(source, bytes) else _num_bytes(source)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=tuple(FORMATS)) as image:
            _check_shape(image, num_bytes)
            yield image
    except MemoryError:
        raise  # not the fault of the file
    except UnidentifiedImageError as error:
        reason = f"not an image in one of the formats {', '.join(FORMATS)}"
        raise UnreadableImage(f"{name}: {reason}") from error
    except Exception as error:
        # On broken files decoders raise OSError, SyntaxError, struct.error and others.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(f"{name}: {reason}") from error


def size_of(source: str | os.PathLike | bytes, name: str) -> tuple[int, int]:
    """(width, height) as the header of a file says; nothing is decoded.

    Raises:
      UnreadableImage: as `read_rgb`.
    """
    with _header(source, name) as image:
        return image.size


def _num_bytes(path: str | os.PathLike) -> int:
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UnreadableImage("a device or pipe, not a file")  # might never end
    return status.st_size


def _check_shape(image: Image.Image, num_bytes: int) -> None:
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise UnreadableImage(
            f"one side of {image.width} x {image.height} pixels is more than "
            f"{MAX_ASPECT} times the other"
        )
    if short * long > max(SMALL, MOST_PIXELS_PER_BYTE * num_bytes):
        raise UnreadableImage(
            f"{image.width} x {image.height} pixels in {num_bytes:,} bytes, a damaged "
            f"header or a decompression bomb: more than {MOST_PIXELS_PER_BYTE} a byte"
        )


def _turn(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    # Nothing says how a picture with broken EXIF is to be turned. Pillow raises
    # struct.error, SyntaxError and others.
    except Exception:
        return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UnreadableImage(
            f"32-bit samples (mode {image.mode}) have no agreed range; "
            "save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF; Pillow reads these as 16 bits
        bits, white = tags.get(258, (16,)), tags.get(262, 1) == 0
        if bits != (16,) or white:
            raise UnreadableImage(
                f"gray of {bits[0]} bits{', 0 for white' if white else ''}; save it "
                "with 8 or 16 bits, 0 for black"
            )
        high_byte = (np.asarray(image) // 256).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Band by band: at once, it would take five times the memory of the result."""
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):
        box = (0, top, image.width, min(top + BAND, image.height))
        band = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        flat.paste(Image.alpha_composite(white, band).convert("RGB"), box)
    return flat


# --- Resizing, cropping ---------------------------------------------------------------


def training_crop(image: Image.Image, size: int, *, patch_size: int) -> Image.Image:
    """Resizes the short side to `size` and crops to the middle square.

    This is torchvision's `Resize(size, BICUBIC)` and `CenterCrop(size)` on a PIL image:
    Pillow's antialiased bicubic filter, the long side rounded down, the crop starting
    at half the surplus, rounded half to even.

    Args:
      image: RGB, any size.
      size: pixels, a multiple of `patch_size`.
      patch_size: pixels per patch side.

    Returns:
      RGB, `size` × `size` pixels.

    Raises:
      ValueError: `size` is not a whole number of patches.
    """
    check_side("size", size, patch_size)
    return _center_crop(_resize_to_cover(image, size, size), size, size)


def evaluation_crop(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Resizes the short side to `resize` and crops to the middle square of `size`.

    As `training_crop`, which has one number for both. Source: dinov2/data/transforms.py
    `make_classification_eval_transform`, with 256 and 224 pixels.

    Args:
      image: RGB, any size.
      resize: pixels, at least `size`.
      size: pixels; of a model's image, a multiple of its patch size.
    """
    return _center_crop(_resize_to_cover(image, resize, resize), size, size)


def training_keep(image: Image.Image, size: int, *, patch_size: int) -> Image.Image:
    """Resizes and crops to the nearest of seven shapes, to keep most of the picture.

    The authors' code has no such option.

    Args:
      image: RGB, any size.
      size: pixels of the short side, a multiple of `patch_size`.
      patch_size: pixels per patch side.

    Returns:
      RGB of the shape in `buckets` with the nearest aspect (by ratio: 2:1 is as far
      from 1:1 as 1:2 is), resized as by `training_crop` to just cover the shape, and
      cropped around the middle. If the square is nearest, the same as `training_crop`.

    Raises:
      ValueError: `size` is not a whole number of patches.
    """
    aspect = math.log(image.width / image.height)
    width, height = min(
        buckets(size, patch_size),
        key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - aspect),
    )
    return _center_crop(_resize_to_cover(image, width, height), width, height)


def buckets(size: int, patch_size: int) -> list[tuple[int, int]]:
    """The shapes of `training_keep`: (width, height) in pixels for each of `ASPECTS`.

    The short side is `size`, the long one rounded to whole patches. At small sizes two
    shapes may coincide.

    Raises:
      ValueError: `size` is not a whole number of patches.
    """
    check_side("size", size, patch_size)
    patches = size // patch_size

    def whole(side: int, short: int) -> int:
        return round(patches * side / short) * patch_size

    return [(whole(w, min(w, h)), whole(h, min(w, h))) for w, h in ASPECTS]


def visual_resize(
    image: Image.Image, short_side: int, *, patch_size: int
) -> Image.Image:
    """Resizes the short side and keeps the aspect, as the authors' visualization.

    Crops on the right and at the bottom, to whole patches and at most `MAX_SIDE`
    pixels.

    Args:
      image: RGB, any size.
      short_side: pixels, a multiple of `patch_size`; the authors' figures use 518,
        and 896 during training.
      patch_size: pixels per patch side.

    Returns:
      RGB, both sides multiples of `patch_size`.

    Raises:
      ValueError: `short_side` is not a whole number of patches.
    """
    check_side("short_side", short_side, patch_size)
    image = _resize_to_cover(image, short_side, short_side)
    width, height = (
        min(side, MAX_SIDE) // patch_size * patch_size for side in image.size
    )
    return image.crop((0, 0, width, height))


def check_side(name: str, side: int, patch_size: int) -> None:
    """Raises ValueError, with the nearest sizes, unless `side` is whole patches.

    And if it is above `LARGEST_SIDE`.
    """
    if side > LARGEST_SIDE:
        raise ValueError(f"{name}: got {side} pixels, expected at most {LARGEST_SIDE}")
    if side > 0 and side % patch_size == 0:
        return
    below = max(1, side // patch_size) * patch_size
    raise ValueError(
        f"{name}: got {side} pixels, expected a multiple of the patch size "
        f"{patch_size}, such as {below} or {below + patch_size}"
    )


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _resize_to_cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """The smallest image of this aspect that covers width × height; rounds down."""
    if image.width * height >= image.height * width:
        sides = (image.width * height // image.height, height)
    else:
        sides = (width, image.height * width // image.width)
    return image.resize(sides, Image.Resampling.BICUBIC)


# --- Pixels to numbers ----------------------------------------------------------------


def normalize(
    image: Image.Image
    | UInt8[np.ndarray, "height width 3"]
    | Float32[np.ndarray, "height width 3"],
    statistics: Statistics,
) -> Float32[np.ndarray, "height width 3"]:
    """Scales RGB pixels to 0 to 1, then to mean 0 and deviation 1 per color.

    Args:
      image: RGB, 0 to 255.
      statistics: of the images that the model was trained on.
    """
    pixels = np.asarray(image).astype(np.float32)
    # By rows of all three colors: twenty times as fast as an innermost axis of 3.
    rows = pixels.reshape(len(pixels), -1)
    rows /= np.float32(255)
    mean, std = np.asarray(statistics, np.float32)
    rows -= np.tile(mean, pixels.shape[1])
    rows /= np.tile(std, pixels.shape[1])
    return rows.reshape(pixels.shape)
