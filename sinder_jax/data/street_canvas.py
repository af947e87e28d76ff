"""A canvas that knows the distance of every pixel, seen by a pinhole camera.

    draws --canvas--> rays of the pixels, nothing drawn yet
    Canvas --paint, the nearest wins--> colors, classes, distances

X points right, Y up and Z ahead, in meters; the camera stands at (0, height, 0). The
ray of a pixel is (right · Z, height - down · Z, Z).
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from sinder_jax.data.augment import Draws
from sinder_jax.data.masks import Mask

HEIGHT, WIDTH = 256, 512  # pixels
CLASSES = (
    "road",
    "sidewalk",
    "building",
    "pole",  # with the lamp or sign on it
    "vegetation",
    "sky",
    "person",
    "car",
)
ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR = range(len(CLASSES))
LATTICE = 64  # points of a period of the noise, in both directions
FAR = 1e6  # meters


class Part(NamedTuple):
    """Pixels, and what is where they look.

    Attributes:
      box: slices of rows and columns.
      across: meters along a plane; one number for each column, or one for each pixel.
      up: Y in meters; one number for each row, or one for each pixel.
      distance: Z in meters, of the same shapes.
    """

    box: tuple[slice, slice]
    across: np.ndarray
    up: np.ndarray
    distance: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Canvas:
    """What is drawn so far, and the rays.

    Attributes:
      colors: RGB, 0 to 1, before haze and light.
      classes: of the pixels.
      distance: Z in meters.
      right: of the rays, by column.
      down: of the rays, by row.
      height: of the camera, in meters.
      lattice: random numbers, 0 to 1, for noise.
    """

    colors: np.ndarray
    classes: Mask
    distance: np.ndarray
    right: np.ndarray
    down: np.ndarray
    height: float
    lattice: np.ndarray

    def noise(self, u: Any, v: Any) -> np.ndarray:
        """Smooth random numbers of a place, 0 to 1; a cell is one unit wide."""
        left, top = np.floor(u), np.floor(v)
        x, y = u - left, v - top
        rows, columns = (
            [(corner.astype(int) + i) % LATTICE for i in (0, 1)]
            for corner in (top, left)
        )
        upper, lower = (
            self.lattice[row, columns[0]] * (1 - x) + self.lattice[row, columns[1]] * x
            for row in rows
        )
        return upper * (1 - y) + lower * y

    def cell(self, u: Any, v: Any) -> np.ndarray:
        """One random number, 0 to 1, for each cell of `noise`."""
        row, column = np.floor(v).astype(int), np.floor(u).astype(int)
        return self.lattice[row % LATTICE, column % LATTICE]

    def paint(self, part: Part, where: np.ndarray, label: int, color: Any) -> None:
        """Colors the pixels of a part that are `where`, unless something is nearer."""
        distance = np.broadcast_to(part.distance, self.distance[part.box].shape)
        where = where & (distance < self.distance[part.box])
        color = np.broadcast_to(color, (*where.shape, 3))
        self.colors[part.box][where] = color[where]
        self.classes[part.box][where] = label
        self.distance[part.box][where] = distance[where]

    def facing(
        self, x: tuple[float, float], y: tuple[float, float], distance: float
    ) -> Part:
        """A rectangle that faces the camera, between two X and two Y."""
        across, up = self.right * distance, self.height - self.down * distance
        columns, rows = _span(across, *x), _span(up, *y)
        return Part(
            (rows, columns),
            across[None, columns],
            up[rows, None],
            np.array([[distance]]),
        )

    def beside(self, x: float, z: tuple[float, float]) -> Part:
        """A plane along the street, at X = `x`, between two Z; `across` is Z."""
        toward = self.right * np.sign(x)
        distance = np.where(toward > 1e-6, abs(x) / np.maximum(toward, 1e-6), FAR)
        columns = _span(distance, *z)
        distance = distance[None, columns]
        up = self.height - self.down[:, None] * distance
        return Part((slice(0, HEIGHT), columns), distance, up, distance)


def _span(values: np.ndarray, low: float, high: float) -> slice:
    """Where values that rise or fall are between two limits."""
    found = np.flatnonzero((values >= low) & (values < high))
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)


def canvas(draws: Draws, bits: np.random.PCG64) -> Canvas:
    """An empty canvas, all sky, and a camera of random height, angle and focus."""
    focal = WIDTH * draws.uniform(0.6, 0.85)
    horizon = HEIGHT * draws.uniform(0.4, 0.52)
    center = WIDTH * draws.uniform(0.4, 0.6)
    return Canvas(
        colors=np.zeros((HEIGHT, WIDTH, 3)),
        classes=np.full((HEIGHT, WIDTH), SKY, np.uint8),
        distance=np.full((HEIGHT, WIDTH), FAR),
        right=(np.arange(WIDTH) + 0.5 - center) / focal,
        down=(np.arange(HEIGHT) + 0.5 - horizon) / focal,
        height=draws.uniform(1.2, 1.7),
        lattice=uniform(bits, LATTICE, LATTICE),
    )


# --- Random numbers and colors --------------------------------------------------------


def uniform(bits: np.random.PCG64, *shape: int) -> np.ndarray:
    """As `Draws.uniform`, many at once."""
    raw = bits.random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def gray(draws: Draws, low: float, high: float, tint: float = 0.04) -> np.ndarray:
    """A gray between two levels, with a slight color."""
    level = draws.uniform(low, high)
    return np.array([level * (1 + draws.uniform(-tint, tint)) for _ in range(3)])


def any_color(draws: Draws, low: float = 0.05, high: float = 0.85) -> np.ndarray:
    """Red, green and blue at random."""
    return np.array([draws.uniform(low, high) for _ in range(3)])


def green(draws: Draws) -> np.ndarray:
    """From yellow to dark green."""
    fresh = np.array([draws.uniform(0.25, 0.6), 0.55, draws.uniform(0.1, 0.3)])
    return fresh * draws.uniform(0.5, 1.1)


def leaves(here: Canvas, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How bright leaves are, about 0.3 to 1.4."""
    coarse, fine = here.noise(u * 1.3, v * 1.3), here.noise(u * 5, v * 5 + 3)
    return 0.35 + 0.6 * coarse + 0.5 * fine
