"""Crops that STEGO and CAUSE train on, and squares by nearest neighbors.

    Scenes --five, super_crops--> Crop, Crop, ...             nothing decoded yet
    Crop --read--> pixels after a JPEG round trip, and mask
    pixels or mask --square--> size × size

The originals write every crop to the disk once, as JPEG and PNG, and train on the
files. Here a crop passes through JPEG in memory: with the same libjpeg, its pixels are
those of the originals' files.
"""

import dataclasses
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sinder_jax.data import decode
from sinder_jax.data.masks import Mask
from sinder_jax.data.opencv import Pixels
from sinder_jax.data.scenes import AnyScene

FIVE = 5  # crops of one size: the corners, then the center
HALF = 0.5  # of each side of a photograph, STEGO's `crop_ratio`
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)  # of each side, CAUSE's crop type "super"
QUALITY = 75  # of JPEG, Pillow's default
KEPT = 4  # scenes decoded last, which the next crops are probably of


# --- Squares --------------------------------------------------------------------------


def square(
    array: UInt8[np.ndarray, "height width *colors"], size: int, *, squash: bool = False
) -> UInt8[np.ndarray, "size size *colors"]:
    """Resizes the short side by nearest neighbors and crops to the middle square.

    The originals resize photographs this way, too, not only masks. Equals torchvision's
    `Resize(size, NEAREST)` and `CenterCrop(size)` of a Pillow image: the long side is
    rounded down, and the crop starts at half the surplus, rounded half to even. Pixel i
    is taken from (i + ½) · old / new, rounded down; Pillow adds up the steps in
    float64, so where that is a whole number, the pixel before may be taken.

    Args:
      array: RGB or a mask.
      size: pixels.
      squash: True resizes both sides to `size`, whatever the aspect, and crops nothing:
        CAUSE's transform of VOC.
    """
    height, width = array.shape[:2]
    short = min(height, width)
    sides = (size, size) if squash else (size * width // short, size * height // short)
    image = Image.fromarray(np.ascontiguousarray(array))
    resized = np.asarray(image.resize(sides, Image.Resampling.NEAREST))
    top, left = (round((side - size) / 2) for side in resized.shape[:2])
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


# --- Crops ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Crop:
    """A part of a scene.

    Attributes:
      scene: what it is a part of.
      kind: "five" or "super".
      number: among the crops of this kind of the scene.
      share: its sides, as shares of the scene's.
      corner: 0 to 4: top left, top right, bottom left, bottom right, center.
      mirrored: True crops the scene's mirror image.
    """

    scene: AnyScene
    kind: str
    number: int
    share: float
    corner: int
    mirrored: bool = False

    @property
    def name(self) -> str:
        """Such as "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png#five3"."""
        return f"{self.scene.name}#{self.kind}{self.number}"

    def stamp(self) -> Any:
        """That of the scene."""
        return self.scene.stamp()

    def read(self) -> tuple[Pixels, Mask]:
        """Crops the decoded scene; the pixels pass through JPEG, the mask does not.

        Raises:
          UnreadableImage: as the scene's `read`; or it is too small for the crop.
        """
        pixels, mask = _DECODED.read(self.scene)
        return _through_jpeg(self._of(pixels)), self._of(mask).copy()

    def read_mask(self) -> Mask:
        """The mask alone, without decoding the photograph; errors as `read`."""
        return self._of(self.scene.read_mask()).copy()

    def _of(self, array: np.ndarray) -> np.ndarray:
        height, width = array.shape[:2]
        sides = [int(side * self.share) for side in (height, width)]
        if not all(sides):
            raise decode.UnreadableImage(
                f"{self.scene.name}: {width} x {height} pixels are too few for crops "
                f"with {self.share:g} of each side"
            )
        if self.mirrored:
            array = array[:, ::-1]
        return array[_box((height, width), sides, self.corner)]


def five(scenes: Sequence[AnyScene]) -> list[Crop]:
    """Five crops a scene, of half its height and width; number 5 · scene + crop.

    Source: mhamilton723/STEGO crop_datasets.py, crop type "five", ratio 0.5.
    """
    return [
        Crop(scene, "five", corner, HALF, corner)
        for scene in scenes
        for corner in range(FIVE)
    ]


def super_crops(scenes: Sequence[AnyScene]) -> list[Crop]:
    """Fifty crops a scene: of five sizes, five as they are, then five mirrored.

    Source: ByungKwanLee/Causal-Unsupervised-Segmentation crop_dataset.py, crop type
    "super".
    """
    kinds = [
        (share, corner, mirrored)
        for share in SHARES
        for mirrored in (False, True)
        for corner in range(FIVE)
    ]
    return [
        Crop(scene, "super", number, *kind)
        for scene in scenes
        for number, kind in enumerate(kinds)
    ]


def _box(
    shape: Sequence[int], sides: Sequence[int], corner: int
) -> tuple[slice, slice]:
    """Where a crop lies, as by torchvision's `five_crop`."""
    starts = []
    for side, length, far in zip(shape, sides, (corner // 2, corner % 2), strict=True):
        surplus = side - length
        starts.append(round(surplus / 2) if corner == FIVE - 1 else far * surplus)
    top, left = starts
    return slice(top, top + sides[0]), slice(left, left + sides[1])


def _through_jpeg(pixels: np.ndarray) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=QUALITY)
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))


class _Decoded:
    """Decodes a scene once for crops that are read one after the other.

    Of a process: threads that ask for a scene while another thread decodes it wait for
    that thread. Worker processes each decode the scenes of their own crops.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, Future[tuple[Pixels, Mask]]] = OrderedDict()

    def read(self, scene: AnyScene) -> tuple[Pixels, Mask]:
        """What the scene's `read` returns, not to be written to; the same errors."""
        stamp = scene.stamp()  # a file that was replaced is decoded anew
        key = (scene, tuple(stamp) if stamp else None)
        with self._lock:
            found = self._kept.get(key)
            first = found is None
            if found is None:
                found = self._kept[key] = Future()
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        if first:
            try:
                found.set_result(scene.read())
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                found.set_exception(error)
        return found.result()


_DECODED = _Decoded()
