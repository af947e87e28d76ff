"""Streets drawn by number: stands in for Cityscapes where there is none.

    number --street_scenery--> sky, house fronts, road, sidewalks
    number --street_things--> trees, poles, people, cars, in front of the scenery
    both, in haze and light, with noise --Street--> pixels and mask

Street k is drawn from k alone, so it is the same in every process. Colors do not give
the classes away: cars, clothes and houses have any color, roads, sidewalks, houses and
poles share grays, and light, haze and camera differ from street to street.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sinder_jax.data import (
    cityscapes,
    street_canvas,
    street_scenery,
    street_things,
)
from sinder_jax.data.augment import Draws
from sinder_jax.data.masks import IGNORE, Mask
from sinder_jax.data.opencv import Pixels
from sinder_jax.data.scene_files import Color
from sinder_jax.data.street_canvas import CLASSES, HEIGHT, SKY, WIDTH, Canvas

NUMBERS = {"train": range(0, 96), "val": range(1_000, 1_024)}
PALETTE: tuple[Color, ...] = tuple(
    cityscapes.PALETTE[cityscapes.CLASSES.index(name)] for name in CLASSES
)


@dataclasses.dataclass(frozen=True, slots=True)
class Street:
    """A street as a camera in a car sees it.

    Attributes:
      split: "train" or "val".
      number: decides everything.
    """

    split: str
    number: int

    @property
    def name(self) -> str:
        """Such as "sample:streets/train#7"."""
        return f"sample:streets/{self.split}#{self.number}"

    def stamp(self) -> None:
        """Nothing: the name tells everything."""

    def read(self) -> tuple[Pixels, Mask]:
        """Draws the street: RGB, and classes; the camera's own car is ignored."""
        pixels, mask = _drawn(self.number)
        return pixels.copy(), mask.copy()

    def read_mask(self) -> Mask:
        """The classes alone."""
        return _drawn(self.number)[1].copy()

    def check(self, num_classes: int) -> tuple[int, tuple[int, int]]:
        """The largest label that a street may have, and its size; draws nothing."""
        del num_classes  # there is no file that could be wrong
        return len(CLASSES) - 1, (HEIGHT, WIDTH)


def scenes(split: str) -> Sequence[Street]:
    """All streets of "train" or "val"."""
    return [Street(split, number) for number in NUMBERS[split]]


@functools.lru_cache(maxsize=sum(map(len, NUMBERS.values())))
def _drawn(number: int) -> tuple[Pixels, Mask]:
    draws, bits = Draws(0, number), np.random.PCG64([1, number])
    canvas = street_canvas.canvas(draws, bits)
    street = street_scenery.plan(draws)
    street_scenery.sky(canvas, draws)
    street_scenery.fronts(canvas, street, draws)
    street_scenery.ground(canvas, street, draws)
    street_things.stand(canvas, street, draws)
    return _photographed(canvas, draws, bits), canvas.classes


def _photographed(canvas: Canvas, draws: Draws, bits: np.random.PCG64) -> Pixels:
    """Haze, the camera's own car, light, blur and noise; that car is ignored."""
    haze = street_canvas.gray(draws, 0.6, 0.9, 0.08)
    share = np.exp(-canvas.distance / draws.uniform(80.0, 500.0))
    share[canvas.classes == SKY] = 1
    colors = canvas.colors * share[..., None] + haze * (1 - share[..., None])
    rise = HEIGHT * draws.uniform(0.02, 0.09)
    bend = ((np.arange(WIDTH) + 0.5) / WIDTH - 0.5) ** 2
    hood = np.arange(HEIGHT)[:, None] > HEIGHT - rise + 3 * rise * bend
    colors[hood] = street_canvas.gray(draws, 0.05, 0.4)
    canvas.classes[hood] = IGNORE
    light = draws.uniform(0.65, 1.15)
    cast = np.array([light * draws.uniform(0.9, 1.1) for _ in range(3)])
    colors = np.clip(colors, 0, 1) ** draws.uniform(0.7, 1.2) * cast
    noise = street_canvas.uniform(bits, HEIGHT, WIDTH, 3) - 0.5
    colors = _blurred(colors) + draws.uniform(0.01, 0.05) * noise
    return np.clip(255 * colors, 0, 255).astype(np.uint8)


def _blurred(colors: np.ndarray) -> np.ndarray:
    """By weights of ¼, ½ and ¼ along both axes."""
    for axis in (0, 1):
        padded = np.pad(colors, [(int(i == axis),) * 2 for i in range(3)], mode="edge")
        steps = np.swapaxes(padded, 0, axis)
        steps = steps[:-2] / 4 + steps[1:-1] / 2 + steps[2:] / 4
        colors = np.swapaxes(steps, 0, axis)
    return colors
