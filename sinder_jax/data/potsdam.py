"""Potsdam-3: the tiles of ISPRS Potsdam as IIC prepared them, in three classes.

    DATA/labelled_train.txt, DATA/labelled_test.txt: the number of a tile on each line
    DATA/imgs/NUMBER.mat: "img", uint8 [200, 200, 4], red, green, blue, infrared
    DATA/gt/NUMBER.mat: "gt", int32 [200, 200], 0 to 5

    lists --scenes--> Tile, Tile, ...        Tile --read--> RGB and mask, 200 × 200

The six labels become three classes: roads and cars (0, 4), buildings and clutter (1,
5), vegetation and trees (2, 3); 255 is ignored. Tiles of any size, without the infrared
channel, or with labels of another integer type are taken, too. `unlabelled_train.txt`
is not read.
Source: xu-ji/IIC potsdam_prepare.py writes the tree; mhamilton723/STEGO data.py
`Potsdam` reads it.
"""

import dataclasses
from pathlib import Path

import numpy as np

from sinder_jax.data import decode, masks, matlab, scene_files
from sinder_jax.data.listing import File
from sinder_jax.data.opencv import Pixels
from sinder_jax.storage import paths
from sinder_jax.storage.paths import AnyPath

LISTS = {"train": "labelled_train.txt", "val": "labelled_test.txt"}
PARTS = ("imgs", "gt")
EXPECTED = (
    "DATA/labelled_train.txt, DATA/labelled_test.txt, DATA/imgs/NUMBER.mat and "
    "DATA/gt/NUMBER.mat (Potsdam as IIC prepared it)"
)
IMAGES = (4_545, 855)  # in the lists
CLASSES = ("roads and cars", "buildings and clutter", "vegetation and trees")
# Of the first label of each class, in ISPRS' images of labels.
PALETTE = ((255, 255, 255), (0, 0, 255), (0, 255, 255))
COARSE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """A piece of an aerial photograph and its labels, in two MATLAB files.

    Attributes:
      image: with the variable "img".
      labels: with the variable "gt".
    """

    image: File
    labels: File

    @property
    def name(self) -> str:
        """The photograph's."""
        return self.image.name

    def stamp(self) -> list[tuple[int, int] | None]:
        """Bytes and time of the last change of both files, see `File.stamp`."""
        return [self.image.stamp(), self.labels.stamp()]

    def read(self) -> tuple[Pixels, masks.Mask]:
        """Reads both: RGB, and the three classes.

        Raises:
          UnreadableImage: a file cannot be read, does not hold such an array, or has a
            label that is none; or the sizes differ.
        """
        pixels, labels = self._pixels(), self._labels()
        if pixels.shape[:2] != labels.shape:
            raise decode.UnreadableImage(
                f"{self.labels.name}: got labels of {labels.shape[1]} x "
                f"{labels.shape[0]} pixels for an image of {pixels.shape[1]} x "
                f"{pixels.shape[0]}, expected the same size"
            )
        mask = np.full(labels.shape, masks.IGNORE, np.uint8)
        for label, coarse in COARSE.items():
            mask[labels == label] = coarse
        return pixels, mask

    def read_mask(self) -> masks.Mask:
        """The three classes alone; errors as `read`, which reads a file as small."""
        return self.read()[1]

    def check(self, num_classes: int) -> tuple[int, tuple[int, int]]:
        """As `WholeScene.check`; reads the photograph, too: it is as small."""
        del num_classes  # `read` refuses all labels but those of the three classes
        _, mask = self.read()
        return masks.largest(mask), (mask.shape[0], mask.shape[1])

    def _pixels(self) -> Pixels:
        found = _variable(self.image, "img")
        if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] not in (3, 4):
            raise decode.UnreadableImage(
                f'{self.image.name}: got "img" of {found.dtype} {found.shape}, '
                "expected uint8 (height, width, 4): red, green, blue, infrared"
            )
        return np.ascontiguousarray(found[..., :3])

    def _labels(self) -> np.ndarray:
        found = _variable(self.labels, "gt")
        if not np.issubdtype(found.dtype, np.integer) or found.ndim != 2:
            raise decode.UnreadableImage(
                f'{self.labels.name}: got "gt" of {found.dtype} {found.shape}, '
                "expected int32 (height, width)"
            )
        unknown = ~np.isin(found, (*COARSE, masks.IGNORE))
        if unknown.any():
            raise decode.UnreadableImage(
                f"{self.labels.name}: got the label {found[unknown][0]}, expected 0 to "
                f"5, or {masks.IGNORE} for pixels to ignore"
            )
        return found


def _variable(file: File, name: str) -> np.ndarray:
    """An array of a MATLAB file."""
    source = file.source()
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        found = list(matlab.variables(content))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise decode.UnreadableImage(f"{file.name}: {reason}") from error
    for each in found:
        if each.name == name and each.array is not None and each.array.size:
            return each.array
    names = ", ".join(each.name for each in found) or "none"
    raise decode.UnreadableImage(
        f'{file.name}: got the variables {names}, expected an array "{name}"'
    )


def find(root: AnyPath) -> AnyPath | None:
    """Where the tree begins, in a folder that the user named; None if not there."""
    listed = any((root / name).exists() for name in LISTS.values())
    return root if listed or all((root / part).is_dir() for part in PARTS) else None


def scenes(root: AnyPath, split: str) -> list[Tile]:
    """The tiles of a list, "train" or "val", in its order.

    Raises:
      FileNotFoundError: the list, or a file of a tile is missing.
      ValueError: the list is empty.
    """
    listed = root / LISTS[split]
    if not listed.exists():
        expected = EXPECTED.replace("DATA", str(root))
        raise FileNotFoundError(f"no list {listed}: expected {expected}")
    numbers = scene_files.read_list(listed, "tile")
    lacking = []
    for part in PARTS:
        there = set(paths.names(root / part))
        lacking += [
            f"{root / part / number}.mat"
            for number in numbers
            if f"{number}.mat" not in there
        ]
    if lacking:
        raise FileNotFoundError(
            f"{len(lacking)} files that {listed} asks for are missing, such as "
            f"{lacking[0]}"
        )
    return [
        Tile(*(File(f"{root / part / number}.mat") for part in PARTS))
        for number in numbers
    ]
