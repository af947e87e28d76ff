"""Anybody's own photographs and masks, in two folders for each split.

DATA/SPLIT/images/NAME.*, DATA/SPLIT/masks/NAME.* --scenes--> Scene, ...

SPLIT is train or val. A mask counts the classes from 0.
"""

from sinder_jax.data import scene_files
from sinder_jax.data.scene_files import Layout, Scene
from sinder_jax.storage.paths import AnyPath

EXPECTED = "DATA/{train,val}/images and DATA/{train,val}/masks"
NAMES = "classes.txt"  # one name per line, from class 0


def find(root: AnyPath) -> AnyPath | None:
    """Where the tree begins, in a folder that the user named; None if not there."""
    return root if any((root / split).is_dir() for split in ("train", "val")) else None


def scenes(root: AnyPath, split: str) -> list[Scene]:
    """The scenes of "train" or "val"; errors as `scene_files.paired`."""
    images, labels = (root / split / each for each in ("images", "masks"))
    return scene_files.paired(images, labels, Layout(EXPECTED), root)


def classes(root: AnyPath) -> tuple[str, ...]:
    """The names in `NAMES`; empty without that file.

    A line left out would shift the names after it.

    Raises:
      ValueError: a line is empty, a name occurs twice, or there is none.
    """
    path = root / NAMES
    if not path.exists():
        return ()
    names = [line.strip() for line in scene_files.read_text(path).rstrip().splitlines()]
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
