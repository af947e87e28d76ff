"""Photographs with a class for every pixel: where they lie, for training and testing.

DATA --open_scenes--> Scenes: train, val, names of the classes      nothing decoded
AnyScene --read--> RGB pixels and mask of the same size
Scenes --survey--> every mask read once: sizes fit, labels are classes

Each tree of files has a module: `own_scenes`, `ade`, `voc`, `cityscapes`, `potsdam`.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sinder_jax.data import (
    ade,
    cityscapes,
    masks,
    mosaics,
    own_scenes,
    potsdam,
    scene_files,
    street_canvas,
    streets,
    voc,
)
from sinder_jax.data.opencv import Pixels
from sinder_jax.data.scene_files import Color
from sinder_jax.storage import paths
from sinder_jax.storage.paths import AnyPath

TRAIN_LIST = "train"  # of VOC
MOSAICS, STREETS = SAMPLES = ("sample:mosaics", "sample:streets")
TREES = (ade, voc, cityscapes, potsdam, own_scenes)
KINDS = "; or ".join(
    [
        f"a folder with {own_scenes.EXPECTED}",
        *(tree.EXPECTED for tree in TREES if tree is not own_scenes),
        *SAMPLES,
    ]
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

    def read_mask(self) -> masks.Mask:
        """Decodes the mask alone; errors as `read`."""


@runtime_checkable
class WholeScene(AnyScene, Protocol):
    """A scene that is no part of another one."""

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
      palette: RGB of each class as the set publishes it; empty if it publishes none.
    """

    title: str
    train: Sequence[WholeScene]
    val: Sequence[WholeScene]
    classes: tuple[str, ...]
    lacks: str = ""
    palette: tuple[Color, ...] = ()


def open_scenes(spec: str, *, train_list: str = TRAIN_LIST) -> Scenes:
    """Lists the scenes of a data set without decoding any.

    Args:
      spec: one of

        `PATH` or `folder:PATH`, on a disk or gs://, with one of five trees. Anybody's
        own: `train/images` and `train/masks`, the same below `val`; a mask has the name
        of its image but for the suffix; `classes.txt` may name the classes. ADE20k as
        published, in ADEChallengeData2016. Pascal VOC as published, in VOC2012 or
        VOCdevkit/VOC2012. Cityscapes as published, with 27 classes. Potsdam as IIC
        prepared it, with three classes.

        `sample:mosaics`: mosaics of the photographs inside scikit-image.

        `sample:streets`: drawn streets, see `streets`.

      train_list: of VOC: the name of a file in ImageSets/Segmentation. `trainaug` is
        the usual name of the list with the masks of SBD; these are then looked for in
        SegmentationClassAug, too.

    Raises:
      FileNotFoundError: a folder, an image or a mask is missing; names it and says what
        is expected where.
      ValueError: two images for one mask, an empty folder, a list or names of classes
        that cannot be used, a `train_list` of other data than VOC, or another form of
        `spec`.
    """
    found = _opened(spec, train_list)
    if train_list != TRAIN_LIST and found.classes is not voc.CLASSES:
        raise ValueError(
            f"config.train_list: got {train_list!r} for {spec}, expected "
            f"{TRAIN_LIST!r}: only VOC2012 has lists of images"
        )
    return found


def _opened(spec: str, train_list: str) -> Scenes:
    if not spec:
        raise ValueError(f"no data given: config.data takes {KINDS}")
    if spec == MOSAICS:
        return Scenes(
            MOSAICS, mosaics.scenes("train"), mosaics.scenes("val"), mosaics.classes()
        )
    if spec == STREETS:
        train, val = (streets.scenes(split) for split in ("train", "val"))
        return Scenes(
            STREETS, train, val, street_canvas.CLASSES, palette=streets.PALETTE
        )
    kind, colon, rest = spec.partition(":")
    if colon and kind == "tfds":
        raise ValueError(
            f"{spec}: got a dataset of TFDS, which has neither the masks of ADE20k "
            "(scene_parse150 holds instances of other classes) nor those of VOC2012 "
            "(voc holds boxes), and needs the published files for Cityscapes; "
            f"config.data takes {KINDS}"
        )
    root = paths.as_path(rest if colon and kind == "folder" else spec)
    with paths.answering(root):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}; config.data takes {KINDS}")
        places = [tree.find(root) for tree in TREES]
    openers: Sequence[Callable[[AnyPath], Scenes]]
    openers = (_ade, functools.partial(_voc, train_list), _cityscapes, _potsdam, _own)
    for folder, opener in zip(places, openers, strict=True):
        if folder is not None:
            return opener(folder)
    raise FileNotFoundError(f"{root} has no images with masks: expected {KINDS}")


# --- Trees ----------------------------------------------------------------------------


def _own(root: AnyPath) -> Scenes:
    train, val = (own_scenes.scenes(root, split) for split in ("train", "val"))
    return Scenes(root.name, train, val, own_scenes.classes(root))


def _ade(root: AnyPath) -> Scenes:
    train, val = (ade.scenes(root, split) for split in ("training", "validation"))
    lacks = scene_files.lacks("ADE20k", (len(train), len(val)), ade.IMAGES)
    return Scenes("ADE20k", train, val, ade.classes(root), lacks)


def _voc(train_list: str, root: AnyPath) -> Scenes:
    train, val = (voc.scenes(root, name) for name in (train_list, "val"))
    title, lacks = f"VOC2012, list {train_list}", ""
    if train_list == TRAIN_LIST:
        lacks = scene_files.lacks("VOC2012", (len(train), len(val)), voc.IMAGES)
    return Scenes(title, train, val, voc.CLASSES, lacks, voc.PALETTE)


def _cityscapes(root: AnyPath) -> Scenes:
    train, val = (cityscapes.scenes(root, split) for split in ("train", "val"))
    lacks = scene_files.lacks("Cityscapes", (len(train), len(val)), cityscapes.IMAGES)
    names, palette = cityscapes.CLASSES, cityscapes.PALETTE
    return Scenes("Cityscapes", train, val, names, lacks, palette)


def _potsdam(root: AnyPath) -> Scenes:
    train, val = (potsdam.scenes(root, split) for split in ("train", "val"))
    lacks = scene_files.lacks("Potsdam-3", (len(train), len(val)), potsdam.IMAGES)
    return Scenes("Potsdam-3", train, val, potsdam.CLASSES, lacks, potsdam.PALETTE)


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
    scenes: Iterable[WholeScene],
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

    def check(scene: WholeScene) -> tuple[int, tuple[int, int]]:
        return scene.check(num_classes)

    largest, sizes = [], []
    with ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for count, (label, size) in enumerate(pool.map(check, scenes), start=1):
            largest.append(label)
            sizes.append(size)
            seen(count)
    return Survey(largest, sizes)
