"""Random transforms of training images, each a function of image, seed and number.

    seed, number --Draws--> draws --crop_and_flip--> the image as a probe sees it
    image, depth, draws --depth_example--> float pixels and meters of one crop

Example `number` of the endless training order `shuffled` is the same in every process
and after a resume, whatever was drawn before it.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

AREA = (0.08, 1.0)  # of a random crop, as a share of the image
ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop
TRIES = 10

# NYU Depth v2: Kinect images of 480 x 640 pixels have a border without depth.
NYU_SIZE = (480, 640)  # rows, columns
NYU_ROWS, NYU_COLUMNS = slice(45, 472), slice(43, 608)
NYU_CROP = (416, 544)  # rows, columns
DEGREES = 2.5  # largest rotation


class Draws:
    """Random numbers for one example of a training run.

    NumPy promises to keep the raw bits of PCG64, but not what its Generator makes of
    them: after an update a resumed run would see other crops.

    Args:
      seed: of the run, from 0.
      number: of the example in the run, from 0.
    """

    def __init__(self, seed: int, number: int):
        self._bits = np.random.PCG64([seed, number])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * (self._bits.random_raw() >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self.uniform() * count)

    def chance(self, probability: float = 0.5) -> bool:
        """True with this probability."""
        return self.uniform() < probability


def shuffled(position: int, count: int, seed: int) -> int:
    """Which of `count` examples is at a position of the endless training order.

    Each pass is a new random permutation without repetition. Equivalent to the sharded
    infinite sampler of "dinov2/data/samplers.py", but independent of the hosts.

    Args:
      position: from 0, counted over all passes.
      count: examples of the training set.
      seed: of the run.
    """
    passes, within = divmod(position, count)
    return int(_permutation(passes, count, seed)[within])


@functools.lru_cache(maxsize=2)  # reading ahead looks into the next pass
def _permutation(number: int, count: int, seed: int) -> np.ndarray:
    keys = np.random.PCG64([seed, number, 1]).random_raw(count)
    return np.argsort(keys, kind="stable")


# --- Classification -------------------------------------------------------------------


def crop_and_flip(image: Image.Image, size: int, draws: Draws) -> Image.Image:
    """A random crop, resized to a square, and mirrored half of the time.

    This is torchvision's `RandomResizedCrop(size, BICUBIC)` and
    `RandomHorizontalFlip`, of "dinov2/data/transforms.py", on a PIL image, with other
    random numbers.

    Args:
      image: RGB, any size.
      size: pixels.
      draws: of this example.

    Returns:
      RGB, `size` × `size` pixels.
    """
    left, top, width, height = random_box(*image.size, draws)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if draws.chance():
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def random_box(width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop of random area and aspect.

    The area is uniform in `AREA`, the logarithm of the aspect in `ASPECT`. After
    `TRIES` boxes that do not fit, the middle of the image with its aspect clamped.
    """
    low, high = (math.log(x) for x in ASPECT)
    for _ in range(TRIES):
        area = width * height * draws.uniform(*AREA)
        aspect = math.exp(draws.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = draws.below(height - h + 1), draws.below(width - w + 1)
            return left, top, w, h
    w, h = width, height
    if width / height < ASPECT[0]:
        h = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        w = round(height * ASPECT[1])
    return (width - w) // 2, (height - h) // 2, w, h


# --- Depth ----------------------------------------------------------------------------


class DepthExample(NamedTuple):
    """A photograph with the distance of its pixels.

    Attributes:
      pixels: RGB, 0 to 255, not normalized.
      depth: meters; 0 where unknown.
    """

    pixels: Float32[np.ndarray, "height width 3"]
    depth: Float32[np.ndarray, "height width"]


def depth_example(
    image: Image.Image, depth: Float[np.ndarray, "height width"], draws: Draws
) -> DepthExample:
    """One random crop of an image of NYU Depth v2, as depth heads are trained on.

    In this order: the border is cut off; half of the time rotated by up to `DEGREES`
    (image bilinear, depth by nearest neighbor, 0 outside); half of the time mirrored;
    cut to `NYU_CROP`; half of the time colored by `recolored`.

    Args:
      image: RGB, 480 × 640 pixels.
      depth: of the same size, meters, 0 where unknown.
      draws: of this example.

    Returns:
      416 × 544 pixels.

    Raises:
      ValueError: the image or the depth has another size.
    """
    check_nyu_size(image, depth)
    box = (NYU_COLUMNS.start, NYU_ROWS.start, NYU_COLUMNS.stop, NYU_ROWS.stop)
    image = image.crop(box)
    meters = Image.fromarray(depth[NYU_ROWS, NYU_COLUMNS].astype(np.float32))
    if draws.chance():
        degrees = draws.uniform(-DEGREES, DEGREES)
        image = image.rotate(degrees, Image.Resampling.BILINEAR)
        meters = meters.rotate(degrees, Image.Resampling.NEAREST)
    if draws.chance():
        image, meters = (
            x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, meters)
        )
    height, width = NYU_CROP
    top = draws.below(image.height - height + 1)
    left = draws.below(image.width - width + 1)
    box = (left, top, left + width, top + height)
    pixels = np.asarray(image.crop(box)).astype(np.float32)
    if draws.chance():
        pixels = recolored(pixels, draws)
    return DepthExample(pixels, np.array(meters.crop(box)))


def check_nyu_size(image: Image.Image, depth: np.ndarray) -> None:
    """Raises ValueError unless image and depth are 480 × 640 pixels."""
    rows, columns = NYU_SIZE
    for what, size in (("an image", image.size[::-1]), ("a depth map", depth.shape)):
        if tuple(size) != NYU_SIZE:
            raise ValueError(
                f"got {what} of {size[1]} x {size[0]} pixels, expected {columns} x "
                f"{rows} as in NYU Depth v2"
            )


def recolored(
    pixels: Float32[np.ndarray, "height width 3"], draws: Draws
) -> Float32[np.ndarray, "height width 3"]:
    """Random gamma, brightness and color; 0 to 255, not rounded.

    The gamma acts on 0 to 255, not 0 to 1, as in the originals: it changes the
    brightness strongly.
    """
    gamma = draws.uniform(0.9, 1.1)
    brightness = draws.uniform(0.75, 1.25)
    colors = [draws.uniform(0.9, 1.1) for _ in range(3)]
    scale = np.float32(brightness) * np.array(colors, np.float32)
    return np.clip(pixels ** np.float32(gamma) * scale[None, None, :], 0, 255)
