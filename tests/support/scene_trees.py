"""Segmentation data in the trees in which it is published: shared by the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


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
