"""Photographs with a class each, for training and for validation.

spec --open_classes--> Classes: photographs, labels, names     nothing decoded yet
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from sinder_jax.data import decode, listing
from sinder_jax.data.listing import Crop, File, Photograph
from sinder_jax.storage import paths

KINDS = "a folder with train/CLASS/ and val/CLASS/, tfds:NAME, or sample:crops"
SPLITS = ("train", "val")
MASKED = {"images", "masks"}  # folders of a segmentation
READERS = 16  # threads that read labels of records
TRAIN_CROPS, VAL_CROPS = 400, 200  # of "sample:crops", equally many of each photograph


class Classes(NamedTuple):
    """Photographs of one split.

    Attributes:
      photographs: in the order of their names.
      labels: the class of each, 0 to C-1.
      names: of the C classes.
    """

    photographs: Sequence[Photograph]
    labels: Int32[np.ndarray, " n"]
    names: tuple[str, ...]

    def absent(self) -> int:
        """How many of the classes have no photograph here."""
        return len(self.names) - len(np.unique(self.labels))


class Splits(NamedTuple):
    """Both splits; their labels mean the same classes."""

    train: Classes
    val: Classes


def open_classes(spec: str) -> Splits:
    """Lists the photographs of a data set with classes, without decoding any.

    Args:
      spec: one of

        `PATH` or `folder:PATH`: class folders, `PATH/train/CLASS/*.jpg` and
        `PATH/val/CLASS/*.jpg`, on a disk or in a bucket; images in sub-folders of a
        class count too. Classes are numbered in the order of their names, as bytes.
        A class of train may have no folder in val.

        `tfds:NAME`: the splits `train` and `validation`, or else `test`, of a prepared
        dataset with the features `image` and `label`, see `listing.open_photographs`.
        Labels lie beside the images, so this reads every record once.

        `sample:crops`: which of the photographs inside scikit-image a random crop is
        from; training and validation crops are different draws.

    Raises:
      FileNotFoundError: a folder is missing; says what is expected where.
      ValueError: a class without images, images outside the classes, fewer than two
        classes, data of a segmentation, or `spec` has another form.
    """
    if not spec:
        raise ValueError(f"no data given: --config.data= takes {KINDS}")
    if spec == listing.CROPS:
        return _crops()
    kind, colon, rest = spec.partition(":")
    if colon and kind not in ("folder", "gs", "tfds") and not Path(spec).exists():
        raise ValueError(f"got the data {spec}, expected {KINDS}")
    if colon and not rest:
        raise ValueError(f"{spec} names nothing: --config.data= takes {KINDS}")
    if kind == "tfds" and colon:
        splits = _of_tfds(spec)
    else:
        splits = _of_folders(rest if colon and kind == "folder" else spec)
    names = splits.train.names
    if len(names) < 2:
        raise ValueError(
            f"{spec}: got 1 class, {names[0]}, expected at least 2; the data is {KINDS}"
        )
    return splits


def _of_folders(folder: str) -> Splits:
    train, val = (_of_folder(folder, split) for split in SPLITS)
    if set(train.names) == MASKED:
        raise ValueError(
            f"{folder}/train has images and masks, as for a segmentation; expected a "
            "folder for each class"
        )
    if unknown := sorted(set(val.names) - set(train.names)):
        raise ValueError(
            f"{folder}: got the class {unknown[0]} in val but not in train; each class "
            "needs a folder in train/"
        )
    places = np.array([train.names.index(name) for name in val.names], np.int32)
    return Splits(train, Classes(val.photographs, places[val.labels], train.names))


def _of_folder(folder: str, split: str) -> Classes:
    root = paths.as_path(folder) / split
    expected = f"expected {folder}/train/CLASS/*.jpg and {folder}/val/CLASS/*.jpg"
    with paths.answering(root):
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}: {expected}")
        there = [each for each in root.iterdir() if not each.name.startswith(".")]
        names = sorted((x.name for x in there if x.is_dir()), key=os.fsencode)
    if not names:
        raise ValueError(f"no class in {root}: {expected}")
    others = {each.name for each in there} - set(names)
    if loose := sorted(x for x in others if x.lower().endswith(decode.SUFFIXES)):
        raise ValueError(
            f"{root} has images that are in no class, such as {loose[0]}: {expected}"
        )
    photographs: list[Photograph] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        try:
            found = listing.open_photographs(f"folder:{root / name}")
        except ValueError:
            raise ValueError(
                f"the class {root / name} has no image: {expected}"
            ) from None
        photographs += found
        labels += [label] * len(found)
    return Classes(photographs, np.array(labels, np.int32), tuple(names))


def _of_tfds(spec: str) -> Splits:
    train = listing.open_photographs(f"{spec}/train")
    try:
        val = listing.open_photographs(f"{spec}/validation")
    except ValueError as error:
        try:
            val = listing.open_photographs(f"{spec}/test")
        except ValueError:
            raise error from None
    return Splits(_labelled_records(train), _labelled_records(val))


def _labelled_records(photographs: Sequence[Any]) -> Classes:
    split = photographs[0].split
    if not (names := split.classes):
        raise ValueError(
            f"{split.name} has no feature `label` with classes: it cannot be classified"
        )
    with ThreadPoolExecutor(READERS) as pool:
        labels = np.array(list(pool.map(lambda each: each.label(), photographs)))
    unlabeled = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if unlabeled.size:
        first = photographs[unlabeled[0]].name
        raise ValueError(
            f"{unlabeled.size} of {len(labels)} records of {split.name} have no label, "
            f"the first is {first}"
        )
    return Classes(photographs, labels.astype(np.int32), names)


def _crops() -> Splits:
    files = [File(os.fspath(path)) for path in listing.sample_images()]
    names = tuple(os.path.splitext(os.path.basename(file.name))[0] for file in files)

    def split(first: int, count: int) -> Classes:
        numbers = range(first, first + count)
        labels = np.array([i % len(files) for i in numbers], np.int32)
        crops = [
            Crop(files[label], i) for label, i in zip(labels, numbers, strict=True)
        ]
        return Classes(crops, labels, names)

    return Splits(split(0, TRAIN_CROPS), split(listing.NUM_CROPS, VAL_CROPS))
