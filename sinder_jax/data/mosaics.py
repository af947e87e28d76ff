"""Mosaics of the sample photographs' textures: segmentation data for those without.

    photograph, four quarters --two: train, two: val--> textures, a class a photograph
    number --regions, a texture with changed colors in each--> Mosaic: pixels and mask

Mosaic k is the same on every machine and in every process: it is drawn from k alone.
Training and validation mosaics share no pixel of a photograph.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sinder_jax.data import decode, listing
from sinder_jax.data.augment import Draws
from sinder_jax.data.masks import IGNORE, Mask
from sinder_jax.data.opencv import Pixels

HEIGHT, WIDTH = 240, 320  # pixels of a mosaic
ROWS, COLUMNS = 2, 3  # of its regions
JITTER = 0.3  # of a region's center, as a share of its distance to the next one
BORDER = 1.5  # pixels on both sides of an edge that belong to no class, as VOC's
PHOTOGRAPH = 512  # pixels of the short side of the photographs that textures are from
GAIN, SHIFT = (0.6, 1.4), (-40.0, 40.0)  # of each color of a region
NUMBERS = {"train": range(0, 96), "val": range(1_000, 1_024)}


@dataclasses.dataclass(frozen=True, slots=True)
class Mosaic:
    """An image of `ROWS` × `COLUMNS` regions, each with the texture of a photograph.

    Attributes:
      split: "train" or "val".
      number: decides everything.
    """

    split: str
    number: int

    @property
    def name(self) -> str:
        """Such as "sample:mosaics/train#7"."""
        return f"sample:mosaics/{self.split}#{self.number}"

    def stamp(self) -> None:
        """Nothing: the name tells everything."""

    def read(self) -> tuple[Pixels, Mask]:
        """Draws the mosaic: RGB, and the number of the photograph of each pixel.

        Raises:
          FileNotFoundError: the photographs are not installed.
        """
        pixels, mask = _drawn(self)
        return pixels.copy(), mask.copy()

    def read_mask(self) -> Mask:
        """The mask alone; errors as `read`."""
        return _drawn(self)[1].copy()

    def check(self, num_classes: int) -> tuple[int, tuple[int, int]]:
        """The largest label that a mosaic may have, and its size; draws nothing."""
        del num_classes  # there is no file that could be wrong
        return len(classes()) - 1, (HEIGHT, WIDTH)


def scenes(split: str) -> Sequence[Mosaic]:
    """All mosaics of "train" or "val"."""
    return [Mosaic(split, number) for number in NUMBERS[split]]


def classes() -> tuple[str, ...]:
    """One class a photograph, named after it; errors as `listing.sample_images`."""
    return tuple(path.stem for path in listing.sample_images())


@functools.lru_cache(maxsize=sum(map(len, NUMBERS.values())))
def _drawn(mosaic: Mosaic) -> tuple[Pixels, Mask]:
    draws = Draws(0, mosaic.number)
    regions, edges = _regions(draws)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask = np.full((HEIGHT, WIDTH), IGNORE, np.uint8)
    for region in range(ROWS * COLUMNS):
        label = draws.below(len(classes()))
        inside = regions == region
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        here = inside[box]
        quarter = _quarters(label, mosaic.split)[draws.below(2)]
        texture = _texture(quarter, here.shape, draws)
        pixels[box][here] = texture[here]
        mask[box][here] = label
    mask[edges < 2 * BORDER] = IGNORE
    return pixels, mask


def _regions(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of jittered centers, and by how much it is nearer than the next."""
    high, wide = HEIGHT / ROWS, WIDTH / COLUMNS
    distances = []
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for row in range(ROWS):
        for column in range(COLUMNS):
            center = (
                (row + 0.5 + draws.uniform(-JITTER, JITTER)) * high,
                (column + 0.5 + draws.uniform(-JITTER, JITTER)) * wide,
            )
            distances.append(np.hypot(y - center[0], x - center[1]))
    ordered = np.sort(distances, axis=0)
    return np.argmin(distances, axis=0), ordered[1] - ordered[0]


def _texture(
    photograph: np.ndarray, shape: tuple[int, int], draws: Draws
) -> np.ndarray:
    """A random part of a photograph, with random colors."""
    smallest = max(n / has for n, has in zip(shape, photograph.shape[:2], strict=True))
    zoom = smallest * draws.uniform(1.0, 1.0 / min(smallest, 1.0))
    sides = [int(n / zoom) for n in shape]
    top, left = (
        draws.below(has - side + 1)
        for has, side in zip(photograph.shape[:2], sides, strict=True)
    )
    part = Image.fromarray(photograph[top : top + sides[0], left : left + sides[1]])
    part = part.resize(shape[::-1], Image.Resampling.BICUBIC)
    if draws.chance():
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = np.array([draws.uniform(*GAIN) for _ in range(3)])
    shift = np.array([draws.uniform(*SHIFT) for _ in range(3)])
    colors = np.asarray(part) * gain[None, None] + shift[None, None]
    return np.clip(colors, 0, 255).astype(np.uint8)


@functools.cache
def _quarters(label: int, split: str) -> list[np.ndarray]:
    """Two quarters of a photograph, in opposite corners."""
    image = decode.read_rgb(os.fspath(listing.sample_images()[label]))
    scale = PHOTOGRAPH / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    upper, lower = np.array_split(pixels, 2, axis=0)
    left, right = (np.array_split(half, 2, axis=1) for half in (upper, lower))
    return [left[0], right[1]] if split == "train" else [left[1], right[0]]
