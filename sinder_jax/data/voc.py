"""Pascal VOC2012 as published: 21 classes, background among them.

DATA/ImageSets/Segmentation/LIST.txt --scenes--> Scene, Scene, ...
DATA/JPEGImages/NAME.jpg, DATA/SegmentationClass/NAME.png --read--> RGB and mask
"""

from sinder_jax.data import scene_files
from sinder_jax.data.listing import File
from sinder_jax.data.scene_files import Color, Scene
from sinder_jax.storage import paths
from sinder_jax.storage.paths import AnyPath

EXPECTED = (
    "DATA/JPEGImages, DATA/SegmentationClass and DATA/ImageSets/Segmentation (VOC)"
)
CLASSES = tuple(
    (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow "
        "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
    ).split()
)
IMAGES = (1_464, 1_449)  # in the lists train and val


def _color(label: int) -> Color:
    """Three bits of a label at a time, from the low ones, are the high bits of RGB."""
    red, green, blue = (
        sum((label >> 3 * k + channel & 1) << 7 - k for k in range(8))
        for channel in range(3)
    )
    return red, green, blue


PALETTE = tuple(_color(label) for label in range(len(CLASSES)))  # VOCdevkit's colors


def find(root: AnyPath) -> AnyPath | None:
    """Where the tree begins, in a folder that the user named; None if not there."""
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "ImageSets").is_dir() or (folder / "JPEGImages").is_dir():
            return folder
    return None


def scenes(root: AnyPath, name: str) -> list[Scene]:
    """The scenes of a list.

    Args:
      root: the folder with ImageSets.
      name: of the list; masks of SBD are looked for in SegmentationClassAug.

    Raises:
      FileNotFoundError: no such list, or a file that it names is missing.
      ValueError: the list is empty.
    """
    folder = root / "ImageSets" / "Segmentation"
    listed = folder / f"{name}.txt"
    if not listed.exists():
        there = ", ".join(sorted(each for each in paths.names(folder))) or "nothing"
        raise FileNotFoundError(f"no list {listed}: {folder} has {there}")
    stems = scene_files.read_list(listed, "image")
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
