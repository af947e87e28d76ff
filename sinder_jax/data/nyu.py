"""NYU Depth v2 as depth estimation uses it: photographs with a distance per pixel.

DATA/nyu_train.txt, nyu_test.txt --open_nyu--> Splits      nothing decoded yet
View --read--> RGB, meters of the same size
"""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

from sinder_jax.data import decode
from sinder_jax.data.augment import NYU_SIZE
from sinder_jax.data.listing import File
from sinder_jax.storage import paths
from sinder_jax.storage.paths import AnyPath

LISTS = ("nyu_train.txt", "nyu_test.txt")
IMAGES = (24_231, 654)  # of the lists that are distributed with BTS
EXPECTED = (
    f"DATA/{LISTS[0]} and DATA/{LISTS[1]}, with the path of an image and of its depth "
    "in each line, such as bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png, and "
    "those files below DATA"
)
PER_METER = 1000  # of the numbers in a depth image
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I")


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A photograph and the distance of its pixels, in two files.

    Attributes:
      image: the photograph.
      depth: 16-bit PNG of millimeters, 0 where unknown.
    """

    image: File
    depth: File

    @property
    def name(self) -> str:
        """The photograph's."""
        return self.image.name

    def stamp(self) -> list[tuple[int, int] | None]:
        """Bytes and time of the last change of both files, see `File.stamp`."""
        return [self.image.stamp(), self.depth.stamp()]

    def read(self) -> tuple[Image.Image, Float32[np.ndarray, "height width"]]:
        """Decodes both: RGB, and meters.

        Raises:
          UnreadableImage: a file cannot be decoded, is not 640 × 480 pixels, or the
            depth does not have 16 bits.
        """
        image = self.image.read()
        with decode.opened(self.depth.source(), self.depth.name) as stored:
            if stored.mode not in SIXTEEN_BITS:
                raise ValueError(
                    f"an image of mode {stored.mode}; expected 16-bit gray, millimeters"
                )
            meters = np.asarray(stored).astype(np.float32) / PER_METER
        for file, size in ((self.image, image.size), (self.depth, meters.shape[::-1])):
            if size != NYU_SIZE[::-1]:
                raise decode.UnreadableImage(
                    f"{file.name}: got {size[0]} x {size[1]} pixels, expected "
                    f"{NYU_SIZE[1]} x {NYU_SIZE[0]} as in NYU Depth v2"
                )
        return image, meters


class Splits(NamedTuple):
    """Both lists.

    Attributes:
      train: views to train on.
      test: views to evaluate.
      lacks: what the usual lists have and these lack; empty if they are complete.
    """

    train: Sequence[View]
    test: Sequence[View]
    lacks: str


def open_nyu(spec: str) -> Splits:
    """Lists the views of NYU Depth v2 without decoding any.

    Args:
      spec: `PATH` or `folder:PATH` of the folder with both lists, on a disk or gs://.

    Raises:
      FileNotFoundError: the folder, a list or a file of a list is missing; says what is
        expected where.
      ValueError: no data given, `spec` has another form, or a list is empty or has
        another form.
    """
    if not spec:
        raise ValueError(f"no data given: config.data takes a folder with {EXPECTED}")
    kind, colon, _ = spec.partition(":")
    if colon and kind not in ("folder", "gs") and not Path(spec).exists():
        raise ValueError(f"got the data {spec}, expected a folder with {EXPECTED}")
    root = paths.as_path(spec.removeprefix("folder:"))
    with paths.answering(root):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}; expected {EXPECTED}")
    train, test = (_listed(root, name) for name in LISTS)
    counts = (len(train), len(test))
    missing = [
        f"{count} of {usual} in {name}"
        for name, count, usual in zip(LISTS, counts, IMAGES, strict=True)
        if count != usual
    ]
    return Splits(train, test, ", ".join(missing))


def _listed(root: AnyPath, name: str) -> list[View]:
    """The views of a list. A third column, of focal lengths, is ignored."""
    path = root / name
    with paths.answering(path):
        if not path.is_file():
            raise FileNotFoundError(f"no list {path}; expected {EXPECTED}")
        content = path.read_bytes()
    views = []
    for number, line in enumerate(os.fsdecode(content).splitlines(), start=1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) < 2:
            raise ValueError(
                f"{path}: got {line!r} in line {number}, expected an image and its "
                f"depth; the data is {EXPECTED}"
            )
        image, depth = (
            File(os.fspath(root / column.lstrip("/"))) for column in columns[:2]
        )
        views.append(View(image, depth))
    if not views:
        raise ValueError(f"{path} lists no image; expected {EXPECTED}")
    _check_there(path, [file for view in views for file in (view.image, view.depth)])
    return views


def _check_there(listing: AnyPath, files: Sequence[File]) -> None:
    """Looks for every file; in a bucket, where that takes hours, for the first two."""
    some = files[:2] if paths.is_remote(listing) else files

    def is_there(file: File) -> bool:
        place = paths.as_path(file.name)
        with paths.answering(place):
            return place.is_file()

    with ThreadPoolExecutor(16) as pool:  # a network disk answers one after the other
        there = list(pool.map(is_there, some))
    if lacking := [file.name for file, yes in zip(some, there, strict=True) if not yes]:
        raise FileNotFoundError(
            f"{len(lacking)} of {len(some)} files of {listing} are missing, such as "
            f"{lacking[0]}; expected {EXPECTED}"
        )
