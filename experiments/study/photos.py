"""The photographs of a command line, read one by one, each with a name of its own.

files, folders --collect--> files --read_photos--> Photo: resized to whole patches
"""

import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sinder_jax.data import decode, listing


class Photo(NamedTuple):
    """A photograph as the models see it.

    Attributes:
      name: names its figures; unique.
      path: of the file.
      pixels: RGB, whole patches.
      digest: SHA-256 of the file.
    """

    name: str
    path: Path
    pixels: np.ndarray
    digest: str


def collect(images: Sequence[str]) -> list[Path]:
    """Expands folders into the images below them; each path once, in the order given.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a folder holds no image.
    """
    files: list[Path] = []
    for image in images:
        path = Path(image)
        if not path.exists():
            raise FileNotFoundError(f"no such image or folder: {image}")
        files += listing.list_images(path) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def unique_names(files: Sequence[Path]) -> list[str]:
    """Returns a name for every file: its stem, then villa-2, villa-3 and so on."""
    names: dict[str, str] = {}
    for file in files:
        tails = (f"-{i}" if i > 1 else "" for i in itertools.count(1))
        candidates = (f"{file.stem}{tail}" for tail in tails)
        # Some file systems take A.png and a.png for one file.
        name = next(name for name in candidates if name.lower() not in names)
        names[name.lower()] = name
    return list(names.values())


def read_photos(
    files: Sequence[Path], image_size: int, patch_size: int
) -> Iterator[Photo]:
    """Reads and resizes photographs, see `decode.visual_resize`.

    Prints a line on stderr for each file that cannot be read, and skips it.

    Args:
      files: image files.
      image_size: short side in pixels, a multiple of `patch_size`.
      patch_size: pixels per patch side.
    """
    for file, name in zip(files, unique_names(files), strict=True):
        try:
            content = file.read_bytes()
            image = decode.read_rgb(content, name=str(file))
        except (OSError, decode.UnreadableImage) as error:
            print(f"skipped, unreadable: {error}", file=sys.stderr, flush=True)
            continue
        pixels = decode.visual_resize(image, image_size, patch_size=patch_size)
        sha256 = hashlib.sha256(content).hexdigest()
        yield Photo(name, file, np.asarray(pixels), sha256)
