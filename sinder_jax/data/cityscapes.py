"""Cityscapes as published, with the 27 classes of unsupervised segmentation.

DATA/leftImg8bit/SPLIT/CITY, DATA/gtFine/SPLIT/CITY --scenes--> Scene, ...

SPLIT is train or val. A mask holds label ids: 7 to 33 are the classes, in order. Lower
ids are no class, nor is the license plate, whose id of -1 is 255 in 8 bits.
Source: mhamilton723/STEGO data.py `CityscapesSeg`; names and colors are those of
Cityscapes' own table of labels.
"""

from sinder_jax.data import scene_files
from sinder_jax.data.scene_files import Layout, Scene
from sinder_jax.storage.paths import AnyPath

IMAGE, MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
EXPECTED = (
    f"DATA/leftImg8bit/{{train,val}}/CITY/NAME{IMAGE} and "
    f"DATA/gtFine/{{train,val}}/CITY/NAME{MASK} (Cityscapes)"
)
LAYOUT = Layout(EXPECTED, IMAGE, MASK, first=7)
IMAGES = (2_975, 500)  # for training and validation

_LABELS = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "parking": (250, 170, 160),
    "rail track": (230, 150, 140),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "guard rail": (180, 165, 180),
    "bridge": (150, 100, 100),
    "tunnel": (150, 120, 90),
    "pole": (153, 153, 153),
    "polegroup": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "caravan": (0, 0, 90),
    "trailer": (0, 0, 110),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
CLASSES, PALETTE = tuple(_LABELS), tuple(_LABELS.values())


def find(root: AnyPath) -> AnyPath | None:
    """Where the tree begins, in a folder that the user named; None if not there."""
    parts = ("leftImg8bit", "gtFine")
    return root if any((root / part).is_dir() for part in parts) else None


def scenes(root: AnyPath, split: str) -> list[Scene]:
    """The scenes of "train" or "val"; errors as `scene_files.paired`."""
    images, labels = (root / part / split for part in ("leftImg8bit", "gtFine"))
    return scene_files.paired(images, labels, LAYOUT, root)
