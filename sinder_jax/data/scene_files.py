"""A photograph and its mask in two files, and folders of such pairs.

    folder of photographs, folder of masks --paired--> Scene, Scene, ...
    Scene --read--> RGB pixels and mask of the same size

What the trees of the data sets share; each tree has a module of its own.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from sinder_jax.data import decode, listing, masks
from sinder_jax.data.listing import File
from sinder_jax.data.opencv import Pixels
from sinder_jax.storage.paths import AnyPath

Color = tuple[int, int, int]  # RGB


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A photograph and its mask, in two files.

    Attributes:
      image: the photograph.
      mask: image of class numbers.
      first: the number of class 0 in the file, see `masks.counted_from`.
    """

    image: File
    mask: File
    first: int = 0

    @property
    def name(self) -> str:
        """The photograph's."""
        return self.image.name

    def stamp(self) -> list[tuple[int, int] | None]:
        """Bytes and time of the last change of both files, see `File.stamp`."""
        return [self.image.stamp(), self.mask.stamp()]

    def read(self) -> tuple[Pixels, masks.Mask]:
        """Decodes both.

        Raises:
          UnreadableImage: a file cannot be decoded, or the sizes differ.
        """
        pixels, mask = np.array(self.image.read()), self.read_mask()
        self._check_size(pixels.shape[1::-1], mask)
        return pixels, mask

    def read_mask(self) -> masks.Mask:
        """Decodes the mask; errors as `masks.read`."""
        mask = masks.read(self.mask.source(), self.mask.name)
        return masks.counted_from(mask, self.first)

    def check(self, num_classes: int) -> tuple[int, tuple[int, int]]:
        """As `WholeScene.check`; the photograph's size is that in its header."""
        mask = self.read_mask()
        self._check_size(decode.size_of(self.image.source(), self.image.name), mask)
        label, first = masks.largest(mask), self.first
        if num_classes and label >= num_classes:
            none = f"0 to {first - 1} and {masks.IGNORE}" if first else masks.IGNORE
            raise ValueError(
                f"{self.mask.name}: got the label {label + first}, expected {first} to "
                f"{num_classes - 1 + first} for {num_classes} classes, or {none} for "
                "pixels to ignore"
            )
        return label, (mask.shape[0], mask.shape[1])

    def _check_size(self, size: Sequence[int], mask: masks.Mask) -> None:
        if tuple(size) != mask.shape[::-1]:
            raise decode.UnreadableImage(
                f"{self.mask.name}: got a mask of {mask.shape[1]} x {mask.shape[0]} "
                f"pixels for an image of {size[0]} x {size[1]}, expected the same size"
            )


class Layout(NamedTuple):
    """How the files of a tree are named.

    Attributes:
      expected: the whole tree below DATA, for messages.
      image: how the names of photographs end; empty: with the suffix of any image.
      mask: how the names of masks end.
      first: the number of class 0 in a mask.
    """

    expected: str
    image: str = ""
    mask: str = ""
    first: int = 0

    def below(self, root: AnyPath) -> str:
        """The whole tree below a folder."""
        return self.expected.replace("DATA", str(root))


def paired(
    images: AnyPath, labels: AnyPath, layout: Layout, root: AnyPath
) -> list[Scene]:
    """The photographs below a folder, each with the mask of the same name.

    Args:
      images: searched recursively.
      labels: likewise; a mask lies where its photograph does, by the rest of its name.
      layout: of the tree.
      root: DATA, for messages.

    Raises:
      FileNotFoundError: a folder, a photograph or a mask is missing.
      ValueError: two images for one mask, or a folder without images.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}: expected {layout.below(root)}"
            )
    photographs = _by_stem(images, layout.image)
    found = _by_stem(labels, layout.mask)
    for stems, others, what, where, ending in (
        (photographs, found, "mask", labels, layout.mask),
        (found, photographs, "image", images, layout.image),
    ):
        if missing := [stem for stem in stems if stem not in others]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(stems)} files have no {what}, such as "
                f"{stems[missing[0]].name}: expected "
                f"{where / missing[0]}{ending or '.*'}"
            )
    return [
        Scene(image, found[stem], layout.first) for stem, image in photographs.items()
    ]


def _by_stem(folder: AnyPath, ending: str) -> dict[str, File]:
    """The images below a folder by their path in it without the ending, in order."""
    found: dict[str, File] = {}
    for file in listing.open_photographs(f"folder:{folder}"):
        assert isinstance(file, File), "of a folder"
        if not file.name.endswith(ending):
            continue
        path = file.name[len(f"{folder}/") :]
        stem = (
            path[: -len(ending)] if ending else str(PurePosixPath(path).with_suffix(""))
        )
        if stem in found:
            raise ValueError(
                f"{found[stem].name} and {file.name} have the same name but for the "
                "suffix: one mask belongs to one image"
            )
        found[stem] = file
    if not found:
        raise FileNotFoundError(f"no file *{ending} below {folder}")
    return found


def read_text(path: AnyPath) -> str:
    """A text file, with or without a byte order mark.

    Raises:
      ValueError: it is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text in UTF-8; save it as UTF-8") from None


def read_list(path: AnyPath, what: str) -> list[str]:
    """The names in a list, one on each line.

    Args:
      path: of the list.
      what: an "image", for the message.

    Raises:
      ValueError: it names nothing, or is not in UTF-8.
    """
    stems = read_text(path).split()
    if not stems:
        raise ValueError(f"{path} names no {what}")
    return stems


def lacks(name: str, found: Sequence[int], published: Sequence[int]) -> str:
    """What a copy lacks, from its numbers of training and validation images.

    Returns:
      A sentence; empty if they are those of the published set.
    """
    if tuple(found) == tuple(published):
        return ""
    return (
        f"{name} has {published[0]:,} training and {published[1]:,} validation images, "
        f"here are {found[0]} and {found[1]}"
    )
