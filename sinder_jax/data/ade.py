"""ADE20k as published for scene parsing, 150 classes: ADEChallengeData2016.

DATA/images/SPLIT/NAME.jpg, DATA/annotations/SPLIT/NAME.png --scenes--> Scene, ...

SPLIT is training or validation. A mask counts the classes from 1, and 0 is none.
"""

from sinder_jax.data import scene_files
from sinder_jax.data.scene_files import Layout, Scene
from sinder_jax.storage.paths import AnyPath

EXPECTED = (
    "DATA/images/{training,validation} and DATA/annotations/{training,validation} "
    "(ADEChallengeData2016)"
)
LAYOUT = Layout(EXPECTED, first=1)
NUM_CLASSES = 150
IMAGES = (20_210, 2_000)  # for training and validation


def find(root: AnyPath) -> AnyPath | None:
    """Where the tree begins, in a folder that the user named; None if not there."""
    for folder in (root, root / "ADEChallengeData2016"):
        if (folder / "annotations").is_dir():
            return folder
    return None


def scenes(root: AnyPath, split: str) -> list[Scene]:
    """The scenes of "training" or "validation"; errors as `scene_files.paired`."""
    images, labels = (root / each / split for each in ("images", "annotations"))
    return scene_files.paired(images, labels, LAYOUT, root)


def classes(root: AnyPath) -> tuple[str, ...]:
    """The names in objectInfo150.txt, which lies in the published tree."""
    numbered = tuple(f"class {k}" for k in range(NUM_CLASSES))
    table = root / "objectInfo150.txt"
    if not table.exists():
        return numbered
    rows = [line.split("\t") for line in scene_files.read_text(table).splitlines()[1:]]
    names = tuple(row[-1].split(",")[0].strip() for row in rows if len(row) >= 5)
    return names if len(names) == NUM_CLASSES else numbered
