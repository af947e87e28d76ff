"""Photographs with a class for every pixel: where they lie, for training and testing.

DATA --open_scenes--> Scenes: train, val, names of the classes      nothing decoded
Scene --read--> RGB pixels and mask of the same size
Scenes --survey--> every mask read once: sizes fit, labels are classes
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sinder_jax.data import decode, listing, masks, mosaics
from sinder_jax.data.listing import File
from sinder_jax.data.opencv import Pixels
from sinder_jax.storage import paths
from sinder_jax.storage.paths import AnyPath

MOSAICS = "sample:mosaics"
CLASSES = "classes.txt"  # of a folder of one's own: one name per line, from class 0
OWN = "DATA/{train,val}/images and DATA/{train,val}/masks"
ADE = (
    "DATA/images/{training,validation} and DATA/annotations/{training,validation} "
    "(ADEChallengeData2016)"
)
VOC = "DATA/JPEGImages, DATA/SegmentationClass and DATA/ImageSets/Segmentation (VOC)"
KINDS = f"a folder with {OWN}; or {ADE}; or {VOC}; or {MOSAICS}"
ADE_CLASSES = 150
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
    "dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
# Training and validation images of the published sets.
ADE_IMAGES, VOC_IMAGES = (20_210, 2_000), (1_464, 1_449)
LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm")


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A photograph and its mask, in two files.

    Attributes:
      image: the photograph.
      mask: image of class numbers.
      zero_is_none: True for ADE20k's numbers, see `masks.without_zero`.
    """

    image: File
    mask: File
    zero_is_none: bool = False

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
        return masks.without_zero(mask) if self.zero_is_none else mask

    def check(self, num_classes: int) -> tuple[int, tuple[int, int]]:
        """As `AnyScene.check`; the photograph's size is that in its header."""
        mask = self.read_mask()
        self._check_size(decode.size_of(self.image.source(), self.image.name), mask)
        label = masks.largest(mask)
        if num_classes and label >= num_classes:
            raise ValueError(
                f"{self.mask.name}: got the label {label + self.zero_is_none}, "
                f"expected {int(self.zero_is_none)} to "
                f"{num_classes - 1 + self.zero_is_none} for {num_classes} classes, or "
                f"{masks.IGNORE} for pixels to ignore"
            )
        return label, (mask.shape[0], mask.shape[1])

    def _check_size(self, size: Sequence[int], mask: masks.Mask) -> None:
        if tuple(size) != mask.shape[::-1]:
            raise decode.UnreadableImage(
                f"{self.mask.name}: got a mask of {mask.shape[1]} x {mask.shape[0]} "
                f"pixels for an image of {size[0]} x {size[1]}, expected the same size"
            )


@runtime_checkable
class AnyScene(Protocol):
    """A photograph with a class for every pixel; can be sent to another process."""

    @property
    def name(self) -> str:
        """A name that no other scene has."""

    def stamp(self) -> Any:
        """What changes with its files, as JSON; None if the name tells everything."""

    def read(self) -> tuple[Pixels, masks.Mask]:
        """Decodes the photograph, RGB, and the mask of the same size.

        Raises:
          UnreadableImage: a file cannot be decoded, or the sizes differ.
        """

    def check(self, num_classes: int) -> tuple[int, tuple[int, int]]:
        """Reads the mask alone: its largest label but 255, and (height, width).

        Args:
          num_classes: labels must be below it; 0 takes any label.

        Raises:
          UnreadableImage: the mask cannot be decoded or has another size than the
            photograph.
          ValueError: a label beyond the classes; names the file.
        """


class Scenes(NamedTuple):
    """A data set for segmentation.

    Attributes:
      title: what it is, for people.
      train: scenes to train heads on.
      val: scenes to evaluate.
      classes: names; empty if nothing names them.
      lacks: what a published set has and this copy lacks; empty if it is complete.
    """

    title: str
    train: Sequence[AnyScene]
    val: Sequence[AnyScene]
    classes: tuple[str, ...]
    lacks: str = ""


def open_scenes(spec: str, *, train_list: str = "train") -> Scenes:
    """Lists the scenes of a data set without decoding any.

    Args:
      spec: one of

        `PATH` or `folder:PATH`, on a disk or gs://, with one of three trees. Anybody's
        own: `train/images` and `train/masks`, the same below `val`; a mask has the name
        of its image but for the suffix; `classes.txt` may name the classes. ADE20k as
        published, in ADEChallengeData2016. Pascal VOC as published, in VOC2012 or
        VOCdevkit/VOC2012.

        `sample:mosaics`: mosaics of the photographs inside scikit-image.

      train_list: of VOC: the name of a file in ImageSets/Segmentation. `trainaug` is
        the usual name of the list with the masks of SBD; these are then looked for in
        SegmentationClassAug, too.

    Raises:
      FileNotFoundError: a folder, an image or a mask is missing; names it and says what
        is expected where.
      ValueError: two images for one mask, an empty folder, a list or names of classes
        that cannot be used, or another form of `spec`.
    """
    if not spec:
        raise ValueError(f"no data given: config.data takes {KINDS}")
    if spec == MOSAICS:
        return Scenes(
            MOSAICS, mosaics.scenes("train"), mosaics.scenes("val"), mosaics.classes()
        )
    kind, colon, rest = spec.partition(":")
    if colon and kind == "tfds":
        raise ValueError(
            f"{spec}: got a dataset of TFDS, which has neither the masks of ADE20k "
            "(scene_parse150 holds instances of other classes) nor those of VOC2012 "
            f"(voc holds boxes); config.data takes {KINDS}"
        )
    root = paths.as_path(rest if colon and kind == "folder" else spec)
    with paths.answering(root):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}; config.data takes {KINDS}")
        tree = _tree_of(root)
    if tree is None:
        raise FileNotFoundError(f"{root} has no images with masks: expected {KINDS}")
    what, folder = tree
    if what == "voc":
        return _voc(folder, train_list)
    return _ade(folder) if what == "ade" else _own(folder)


def _tree_of(root: AnyPath) -> tuple[str, AnyPath] | None:
    """Which of the trees lies in a folder, and where in it."""
    for folder in (root, root / "ADEChallengeData2016"):
        if (folder / "annotations").is_dir():
            return "ade", folder
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "ImageSets").is_dir() or (folder / "JPEGImages").is_dir():
            return "voc", folder
    for split in ("train", "val"):
        if (root / split).is_dir():
            return "own", root
    return None


# --- Trees ----------------------------------------------------------------------------


def _own(root: AnyPath) -> Scenes:
    train, val = (
        _paired(root / split / "images", root / split / "masks", OWN, root)
        for split in ("train", "val")
    )
    names: tuple[str, ...] = ()
    if (root / CLASSES).exists():
        names = _class_names(root / CLASSES)
    return Scenes(root.name, train, val, names)


def _class_names(path: AnyPath) -> tuple[str, ...]:
    """A name on each line; a line left out would shift those after it."""
    names = [line.strip() for line in _text(path).rstrip().splitlines()]
    if not names:
        raise ValueError(f"{path}: no class is named; expected one name on each line")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise ValueError(
                f"{path}: line {number} is empty, expected the name of class "
                f"{number - 1}"
            )
        if name in seen:
            raise ValueError(
                f"{path}: got {name!r} on line {seen[name]} and on line {number}, "
                "expected a name of its own for each class"
            )
        seen[name] = number
    return tuple(names)


def _text(path: AnyPath) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text in UTF-8; save it as UTF-8") from None


def _ade(root: AnyPath) -> Scenes:
    train, val = (
        _paired(root / "images" / split, root / "annotations" / split, ADE, root, True)
        for split in ("training", "validation")
    )
    found = (len(train), len(val))
    lacks = "" if found == ADE_IMAGES else _incomplete("ADE20k", found, ADE_IMAGES)
    return Scenes("ADE20k", train, val, _ade_names(root), lacks)


def _ade_names(root: AnyPath) -> tuple[str, ...]:
    """The names in objectInfo150.txt, which lies in the published tree."""
    numbered = tuple(f"class {k}" for k in range(ADE_CLASSES))
    table = root / "objectInfo150.txt"
    if not table.exists():
        return numbered
    rows = [line.split("\t") for line in _text(table).splitlines()[1:]]
    names = tuple(row[-1].split(",")[0].strip() for row in rows if len(row) >= 5)
    return names if len(names) == ADE_CLASSES else numbered


def _voc(root: AnyPath, train_list: str) -> Scenes:
    train, val = (_voc_list(root, name) for name in (train_list, "val"))
    title = f"VOC2012, list {train_list}"
    found = (len(train), len(val))
    lacks = ""
    if train_list == "train" and found != VOC_IMAGES:
        lacks = _incomplete("VOC2012", found, VOC_IMAGES)
    return Scenes(title, train, val, tuple(VOC_CLASSES), lacks)


def _voc_list(root: AnyPath, name: str) -> list[Scene]:
    folder = root / "ImageSets" / "Segmentation"
    listed = folder / f"{name}.txt"
    if not listed.exists():
        there = ", ".join(sorted(each for each in paths.names(folder))) or "nothing"
        raise FileNotFoundError(f"no list {listed}: {folder} has {there}")
    stems = _text(listed).split()
    if not stems:
        raise ValueError(f"{listed} names no image")
    images = set(paths.names(root / "JPEGImages"))
    places = [
        (place, set(paths.names(root / place)))
        for place in ("SegmentationClass", "SegmentationClassAug")
    ]
    found, lacking = [], []
    for stem in stems:
        place = next((p for p, names in places if f"{stem}.png" in names), None)
        if f"{stem}.jpg" not in images:
            lacking.append(f"{root / 'JPEGImages' / stem}.jpg")
        elif place is None:
            lacking.append(f"{root / 'SegmentationClass' / stem}.png")
        else:
            image = File(f"{root / 'JPEGImages' / stem}.jpg")
            found.append(Scene(image, File(f"{root / place / stem}.png")))
    if lacking:
        raise FileNotFoundError(
            f"{len(lacking)} files that {listed} asks for are missing, such as "
            f"{lacking[0]}"
        )
    return found


def _paired(
    images: AnyPath,
    labels: AnyPath,
    expected: str,
    root: AnyPath,
    zero_is_none: bool = False,
) -> list[Scene]:
    """The images of a folder, each with the mask of the same stem."""
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}: expected {expected.replace('DATA', str(root))}"
            )
    photographs, found = _by_stem(images), _by_stem(labels)
    for stems, others, what, where in (
        (photographs, found, "mask", labels),
        (found, photographs, "image", images),
    ):
        if missing := [stem for stem in stems if stem not in others]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(stems)} files have no {what}, such as "
                f"{stems[missing[0]].name}: expected {where / missing[0]}.*"
            )
    return [
        Scene(image, found[stem], zero_is_none) for stem, image in photographs.items()
    ]


def _by_stem(folder: AnyPath) -> dict[str, File]:
    """The images below a folder by their path in it without suffix, in order."""
    found: dict[str, File] = {}
    for file in listing.open_photographs(f"folder:{folder}"):
        stem = os.path.splitext(file.name[len(f"{folder}/") :])[0]
        if stem in found:
            raise ValueError(
                f"{found[stem].name} and {file.name} have the same name but for the "
                "suffix: one mask belongs to one image"
            )
        assert isinstance(file, File), "of a folder"
        found[stem] = file
    return found


def _incomplete(name: str, found: Sequence[int], published: Sequence[int]) -> str:
    return (
        f"{name} has {published[0]:,} training and {published[1]:,} validation images, "
        f"here are {found[0]} and {found[1]}"
    )


# --- Checks ---------------------------------------------------------------------------


class Survey(NamedTuple):
    """What the masks of some scenes hold.

    Attributes:
      largest: label but 255 of each mask, in order; -1 if there is none.
      sizes: (height, width) of each.
    """

    largest: list[int]
    sizes: list[tuple[int, int]]


def survey(
    scenes: Iterable[AnyScene],
    num_classes: int = 0,
    *,
    num_threads: int = 4,
    seen: Callable[[int], None] = lambda count: None,
) -> Survey:
    """Reads every mask once, before anything is trained on them.

    Args:
      scenes: of both splits.
      num_classes: labels must be below it; 0 takes any label.
      num_threads: threads that read.
      seen: told after each mask how many have been read.

    Raises:
      UnreadableImage: a mask cannot be decoded or has another size than its image.
      ValueError: a label beyond the classes; names the file.
    """

    def check(scene: AnyScene) -> tuple[int, tuple[int, int]]:
        return scene.check(num_classes)

    largest, sizes = [], []
    with ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for count, (label, size) in enumerate(pool.map(check, scenes), start=1):
            largest.append(label)
            sizes.append(size)
            seen(count)
    return Survey(largest, sizes)
