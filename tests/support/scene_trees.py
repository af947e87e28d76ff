"""Segmentation data in the trees in which it is published: shared by the tests."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def save(
    image: Path, mask: Path, labels: np.ndarray, size: tuple[int, int] | None = None
) -> None:
    """A photograph whose grays tell the classes of its mask."""
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    photograph = Image.fromarray((labels % 8 * 30).astype(np.uint8)).convert("RGB")
    photograph.resize(size or photograph.size).save(image)
    Image.fromarray(labels).save(mask)


def labels(seed: int, classes: int = 3, first: int = 0, shape=(24, 36)) -> np.ndarray:
    """Blocks of classes, and some pixels of none."""
    rng = np.random.default_rng(seed)
    height, width = shape
    small = rng.integers(first, first + classes, (height // 12, width // 12))
    found = np.repeat(np.repeat(small, 12, 0), 12, 1).astype(np.uint8)
    found[0, :4] = 255
    return found


def own(root: Path, train: int = 4, val: int = 2, **options) -> Path:
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            save(
                root / split / "images" / f"{i}.jpg",
                root / split / "masks" / f"{i}.png",
                labels(i, **options),
            )
    return root


def ade(root: Path, train: int = 4, val: int = 2) -> Path:
    for split, count in (("training", train), ("validation", val)):
        for i in range(count):
            save(
                root / "images" / split / f"ADE_{i:08d}.jpg",
                root / "annotations" / split / f"ADE_{i:08d}.png",
                labels(i, first=0, classes=151),
            )
    return root


def voc(root: Path, train: int = 4, val: int = 2) -> Path:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, first, count in (("train", 0, train), ("val", 100, val)):
        stems = [f"2007_{first + i:06d}" for i in range(count)]
        (lists / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for i, stem in enumerate(stems):
            save(
                root / "JPEGImages" / f"{stem}.jpg",
                root / "SegmentationClass" / f"{stem}.png",
                labels(first + i, classes=21),
            )
    return root


def cityscapes(root: Path, train: int = 4, val: int = 2, shape=(24, 48)) -> Path:
    """Two cities a split, with the other files that lie beside the label ids."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            stem = f"{split}{i % 2}/{split}{i % 2}_{i:06d}_000019"
            fine = root / "gtFine" / split
            save(
                root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png",
                fine / f"{stem}_gtFine_labelIds.png",
                labels(i, classes=34, shape=shape),
            )
            for other in ("color", "instanceIds"):
                Image.new("L", (3, 2)).save(fine / f"{stem}_gtFine_{other}.png")
    return root


def potsdam(root: Path, train: int = 4, val: int = 2, side: int = 24) -> Path:
    """As IIC's preparation writes it; the last tile has no labels and is in no list."""
    for part in ("imgs", "gt"):
        (root / part).mkdir(parents=True)
    names = [str(7 * i % 31) for i in range(train + val + 1)]
    (root / "labelled_train.txt").write_text("".join(f"{n}\n" for n in names[:train]))
    (root / "labelled_test.txt").write_text("".join(f"{n}\n" for n in names[train:-1]))
    (root / "unlabelled_train.txt").write_text(f"{names[-1]}\n")
    for i, name in enumerate(names):
        found = labels(i, classes=6, shape=(side, side))
        image = np.stack([found % 8 * 30, found, found * 2, found * 3], axis=-1)
        savemat(root / "imgs" / f"{name}.mat", {"img": image.astype(np.uint8)})
        if name != names[-1]:
            savemat(root / "gt" / f"{name}.mat", {"gt": found.astype(np.int32)})
    return root
