"""The photographs of a command line, read one by one, each with a name of its own.

files, folders --collect--> files --read_photos--> Photo: resized to whole patches
"""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sinder_jax import cli
from sinder_jax.data import decode, listing

MOST_STEM = 180  # bytes


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

    Prints a line on stderr for each folder that holds other files.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a folder holds no image.
    """
    files: list[Path] = []
    for image in images:
        path = Path(image)
        if not path.exists():
            raise FileNotFoundError(f"no such image or folder: {image}")
        files += listing.list_images(path, _say) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def unique_names(files: Sequence[Path]) -> list[str]:
    """Returns a name for every file: its stem, then villa-2, villa-3 and so on."""
    names: dict[str, str] = {}
    for file in files:
        # Cut short: names of figures are longer, and 255 bytes is the most there is.
        stem = file.stem
        while len(os.fsencode(stem)) > MOST_STEM:
            stem = stem[:-1]
        tails = (f"-{i}" if i > 1 else "" for i in itertools.count(1))
        candidates = (f"{stem}{tail}" for tail in tails)
        # Some file systems take A.png and a.png for one file.
        name = next(name for name in candidates if name.lower() not in names)
        names[name.lower()] = name
    return list(names.values())


def read_photos(
    files: Sequence[Path], image_size: int, patch_size: int
) -> Iterator[Photo]:
    """Reads photographs upright and resizes them, see `decode.visual_resize`.

    Prints a line on stderr for each file that cannot be read, and skips it; and for
    each that is cut because its long side is too long.

    Args:
      files: image files.
      image_size: short side in pixels, a multiple of `patch_size`.
      patch_size: pixels per patch side.
    """
    for file, name in zip(files, unique_names(files), strict=True):
        try:
            image = listing.File(str(file)).read(upright=True)
        except decode.UnreadableImage as error:
            _say(f"skipped, unreadable: {error}")
            continue
        short, long = sorted(image.size)
        most = decode.MAX_SIDE * short // long  # pixels of the short side, uncut
        if image_size > most:
            _say(
                f"{file}: cut, only {decode.MAX_SIDE} of {image_size * long // short} "
                f"pixels are shown; a short side of {most // patch_size * patch_size} "
                "shows them all"
            )
        pixels = decode.visual_resize(image, image_size, patch_size=patch_size)
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        yield Photo(name, file, np.asarray(pixels), sha256)


def _say(text: str) -> None:
    print(cli.shown(text), file=sys.stderr, flush=True)
