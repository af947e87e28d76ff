"""Photographs in: sorted files -> RGB -> resized -> normalized, in a fixed order.

    folder --list_images--> files --training_list--> files
    file --read_rgb--> RGB --training_crop | visual_resize--> RGB --normalize--> array
    files, start --stream--> Batch, Batch, ...          image k is files[k % n]

Sizes follow torchvision's arithmetic on PIL images, which the authors used. The
position in the training list is one number k: nothing else is needed to continue.
"""

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import grain

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # compared in lower case
PATCH_SIZE = 14  # pixels; every DINOv2 model
MAX_ASPECT = 100  # long side / short side; beyond it one resized image fills gigabytes

# Mean and standard deviation of ImageNet's red, green and blue, for pixels in 0 to 1.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

# What Pillow may try on a file, whatever its name: ImageNet holds a PNG called .JPEG.
# Formats that start another program (EPS runs Ghostscript) stay out.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

# The color photographs inside scikit-image's wheel. Drawings are left out, and so is
# motorcycle_right.png: it is the other half of a stereo pair, so nothing held out
# would be new beside motorcycle_left.png.
_SAMPLES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


class UnreadableImage(ValueError):
    """A file that holds no image Pillow can decode whole. The message names it."""


class Batch(NamedTuple):
    """B consecutive images of a training list.

    Attributes:
      positions: the number k of each image, counted over all walks of the list.
      images: normalized pixels; zeros where the file could not be read.
      valid: False where the file could not be read.
      errors: one message per unreadable file, in the order of `positions`.
    """

    positions: Int64[np.ndarray, " B"]
    images: Float32[np.ndarray, "B size size 3"]
    valid: Bool[np.ndarray, " B"]
    errors: list[str]


# --- Files ----------------------------------------------------------------------------


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Lists the photographs below a folder in an order no file system changes.

    The authors took the order of `glob`, which is that of the directory; here paths
    are sorted, since the order decides what the repair learns from.

    Args:
      folder: searched recursively; links to folders are followed, loops are not.

    Returns:
      Files named .jpg, .jpeg, .png or .webp in any case, sorted by their POSIX path
      relative to `folder`, as bytes (so `B.jpg` comes before `a.jpg`).

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it is a file, or no image lies below it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such image folder: {folder}")
    if not folder.is_dir():
        raise ValueError(f"not a folder but a file: {folder}; give the folder it is in")
    files = sorted(
        _walk(folder, frozenset()),
        key=lambda file: os.fsencode(file.relative_to(folder).as_posix()),
    )
    if not files:
        raise ValueError(
            f"no images in {folder}: looked there and in its sub-folders for files "
            f"ending in {', '.join(SUFFIXES)} in any case"
        )
    return files


def _walk(folder: Path, ancestors: frozenset[Path]) -> Iterator[Path]:
    here = folder.resolve()
    if here in ancestors:  # a link back to a folder we are inside of
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(folder / entry.name, ancestors | {here})
            elif entry.name.lower().endswith(SUFFIXES):
                yield folder / entry.name


def sample_images() -> list[Path]:
    """Returns the color photographs inside scikit-image's wheel, sorted by name.

    They are read from the installed package, so nothing is downloaded, and scikit-image
    itself is not imported.

    Raises:
      FileNotFoundError: scikit-image, or every one of these photographs, is missing.
    """
    package = importlib.util.find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            "the sample photographs are part of scikit-image, which is not installed: "
            "run `pip install scikit-image` or give a folder of images"
        )
    folder = Path(package.submodule_search_locations[0]) / "data"
    files = [folder / name for name in _SAMPLES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"no sample photographs in {folder}: looked for {', '.join(_SAMPLES)}"
        )
    return files


def training_list(files: Sequence[Path], num_images: int) -> list[Path]:
    """Thins a sorted list to about `num_images`, evenly (the authors' slice).

    Args:
      files: sorted, see `list_images`.
      num_images: how many are wanted, at least 1. Every n-th file is taken, n being
        the whole part of len(files) / num_images and at least 1, so the result is
        somewhat longer than asked for, or all there are.

    Raises:
      ValueError: `num_images` is below 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, and must be at least 1")
    return list(files[:: max(1, len(files) // num_images)])


# --- One picture ----------------------------------------------------------------------


def read_rgb(path: str | os.PathLike) -> Image.Image:
    """Decodes a file to 8-bit RGB at full size.

    EXIF rotation is not applied and JPEGs are never decoded at reduced size, as in the
    authors' loader. Transparent pixels are laid over white; 16-bit samples keep their
    high byte; grayscale, palette and CMYK images are converted by Pillow.

    Raises:
      UnreadableImage: the file is missing, truncated, not an image, larger than
        Pillow's limit against decompression bombs (about 179 million pixels), more
        than `MAX_ASPECT` times longer than wide or the reverse, or of 32-bit
        samples, whose range is unknown.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_aspect(image)
            return _to_rgb(image)
    except MemoryError:
        raise  # of this machine, not of the file
    except UnreadableImage as error:
        raise UnreadableImage(f"{os.fspath(path)}: {error}") from None
    except UnidentifiedImageError as error:
        reason = f"not an image in one of the formats {', '.join(_FORMATS)}"
        raise UnreadableImage(f"{os.fspath(path)}: {reason}") from error
    except Exception as error:
        # Decoders meet a broken file with OSError, SyntaxError, struct.error, and more.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(f"{os.fspath(path)}: {reason}") from error


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


def training_crop(
    image: Image.Image, size: int = 518, *, patch_size: int = PATCH_SIZE
) -> Image.Image:
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
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def visual_resize(
    image: Image.Image,
    short_side: int = 518,
    *,
    patch_size: int = PATCH_SIZE,
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


def check_side(name: str, side: int, patch_size: int = PATCH_SIZE) -> None:
    """Raises ValueError, with sizes near it, unless `side` is whole patches."""
    if side > 0 and side % patch_size == 0:
        return
    below = max(1, side // patch_size) * patch_size
    raise ValueError(
        f"{name} is {side} pixels, and must be a multiple of the patch size "
        f"{patch_size}, such as {below} or {below + patch_size}"
    )


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    short, long = sorted(image.size)
    new_long = int(size * long / short)
    portrait = image.width <= image.height
    sides = (size, new_long) if portrait else (new_long, size)
    return image.resize(sides, Image.Resampling.BICUBIC)


def normalize(image: Image.Image) -> Float32[np.ndarray, "height width 3"]:
    """Scales RGB pixels to 0 to 1, then to ImageNet's mean 0 and deviation 1."""
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return (pixels - IMAGENET_MEAN) / IMAGENET_STD


def to_uint8(
    normalized: Float32[np.ndarray, "height width 3"],
) -> UInt8[np.ndarray, "height width 3"]:
    """Gives back the pixels `normalize` came from, exactly."""
    pixels = (normalized * IMAGENET_STD + IMAGENET_MEAN) * np.float32(255)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


# --- The stream -----------------------------------------------------------------------


class _Example(NamedTuple):
    position: int
    image: Float32[np.ndarray, "size size 3"]
    error: str | None


def stream(
    files: Sequence[Path],
    size: int,
    *,
    start: int = 0,
    batch_size: int = 1,
    num_threads: int = 4,
    patch_size: int = PATCH_SIZE,
) -> Generator[Batch, None, None]:
    """Reads a training list cyclically and for ever, from position `start` on.

    Image k is `training_crop(files[k % n], size)`, normalized. The sequence is the same
    for any number of threads, and a stream started at k continues one that got there. A
    file that cannot be read keeps its place: zeros, `valid` False and a message.
    Closing the stream ends the threads that read ahead for it.

    Args:
      files: the training list, n files.
      size: pixels, a multiple of `patch_size`.
      start: position of the first image, from 0.
      batch_size: images per batch.
      num_threads: threads that read ahead; 0 reads when asked.
      patch_size: pixels per patch side.

    Raises:
      ValueError: an empty list or an argument out of its range; raised by the call,
        not by the first batch.
    """
    check_side("size", size, patch_size)
    if not files:
        raise ValueError("the training list is empty: no images to stream")
    for name, value, least in (
        ("start", start, 0),
        ("batch_size", batch_size, 1),
        ("num_threads", num_threads, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, and must be at least {least}")

    import grain  # takes a second, which `--help` and tests of files need not wait for

    def read(position: int) -> _Example:
        return _example(files[position % len(files)], position, size, patch_size)

    dataset = (
        grain.MapDataset.range(start, sys.maxsize)
        .map(read)
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=num_threads,
                prefetch_buffer_size=max(2 * batch_size, num_threads),
            )
        )
        .batch(batch_size, batch_fn=_collate)
    )
    return _until_closed(dataset)


def _until_closed(dataset: "grain.IterDataset") -> Generator[Batch, None, None]:
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()  # ends the reading threads with the caller's loop


def _example(path: Path, position: int, size: int, patch_size: int) -> _Example:
    try:
        image = training_crop(read_rgb(path), size, patch_size=patch_size)
    except UnreadableImage as error:
        return _Example(position, np.zeros((size, size, 3), np.float32), str(error))
    return _Example(position, normalize(image), None)


def _collate(examples: Sequence[_Example]) -> Batch:
    return Batch(
        positions=np.array([example.position for example in examples], np.int64),
        images=np.stack([example.image for example in examples]),
        valid=np.array([example.error is None for example in examples]),
        errors=[example.error for example in examples if example.error is not None],
    )
