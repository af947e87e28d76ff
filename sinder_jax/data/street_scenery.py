"""What surrounds the camera: sky, house fronts, hedges, road and sidewalks.

draws --plan--> edges of the street --sky, fronts, ground--> Canvas
"""

from typing import NamedTuple

import numpy as np

from sinder_jax.data import street_canvas
from sinder_jax.data.augment import Draws
from sinder_jax.data.street_canvas import HEIGHT, WIDTH, Canvas, Part, gray

WHOLE = slice(0, WIDTH)


class Plan(NamedTuple):
    """A street from above, in meters.

    Attributes:
      road: X of its edges.
      fronts: X of the house fronts on both sides.
      end: Z where the street ends.
      sunny: 0 or 1, the side in the sun.
      shade: light in shadows, 0 to 1.
    """

    road: tuple[float, float]
    fronts: tuple[float, float]
    end: float
    sunny: int
    shade: float


def plan(draws: Draws) -> Plan:
    """A random street; the camera is on its right half."""
    left, right = -draws.uniform(3.5, 7.0), draws.uniform(3.0, 5.5)
    return Plan(
        road=(left, right),
        fronts=(left - draws.uniform(2.0, 4.5), right + draws.uniform(2.0, 4.5)),
        end=draws.uniform(45.0, 110.0),
        sunny=draws.below(2),
        shade=draws.uniform(0.45, 0.8),
    )


def sky(canvas: Canvas, draws: Draws) -> None:
    """Blue, gray or white, with clouds."""
    blue = np.array([0.35, 0.55, 0.85]) * draws.uniform(0.7, 1.15)
    white = gray(draws, 0.75, 0.98)
    cover = draws.uniform(0.0, 1.3)
    above = int(np.sum(canvas.down < 0))
    up = -canvas.down[:above, None]
    u, v = canvas.right[None] / (up + 0.15), 1 / (up + 0.15)
    clouds = 0.6 * canvas.noise(3 * u, 3 * v) + 0.4 * canvas.noise(9 * u, 9 * v)
    share = np.clip(clouds + cover - 0.7 + np.maximum(0.25 - up, 0.0), 0, 1)[..., None]
    canvas.colors[:above] = blue * (1 - share) + white * share


# --- House fronts ---------------------------------------------------------------------


def fronts(canvas: Canvas, street: Plan, draws: Draws) -> None:
    """Houses and hedges on both sides, and those that close the street."""
    for side, front in enumerate(street.fronts):
        light = 1.0 if side == street.sunny else street.shade
        start = -draws.uniform(0.0, 15.0)
        while start < street.end:
            stop = start + draws.uniform(7.0, 18.0)
            part = canvas.beside(front, (max(start, 0.0), min(stop, street.end)))
            _front(canvas, part, start, light, draws)
            start = stop
    start = street.fronts[0]
    while start < street.fronts[1]:
        stop = start + draws.uniform(5.0, 14.0)
        across = start, min(stop, street.fronts[1])
        part = canvas.facing(across, (0.0, 40.0), street.end)
        _front(canvas, part, start, 0.9, draws)
        start = stop


def _front(
    canvas: Canvas, part: Part, start: float, light: float, draws: Draws
) -> None:
    if draws.chance(0.25):
        _hedge(canvas, part, start, light, draws)
    else:
        _house(canvas, part, start, light, draws)


def _hedge(
    canvas: Canvas, part: Part, start: float, light: float, draws: Draws
) -> None:
    tall, base = draws.uniform(2.5, 7.0), street_canvas.green(draws)
    u, v = part.across - start, part.up
    ragged = tall * (0.75 + 0.5 * canvas.noise(u, v / 2 + 7))
    colors = base * street_canvas.leaves(canvas, u, v)[..., None] * light
    canvas.paint(part, (v > 0) & (v < ragged), street_canvas.VEGETATION, colors)


def _house(
    canvas: Canvas, part: Part, start: float, light: float, draws: Draws
) -> None:
    """A wall with rows of windows, a ledge above the first row, and a cornice."""
    tall, base = draws.uniform(6.0, 20.0), _wall(draws)
    wide, high = draws.uniform(1.6, 3.4), draws.uniform(2.6, 3.4)  # from pane to pane
    pane = draws.uniform(0.35, 0.65) * wide / 2, draws.uniform(0.4, 0.65) * high / 2
    glass, bricks = gray(draws, 0.08, 0.35, 0.2), draws.uniform(0.0, 0.15)
    u, v = part.across - start, part.up
    rough = 1 + bricks * (canvas.noise(u * 6, v * 6) - 0.5)
    colors = base * rough[..., None]
    inside = np.abs(u % wide - wide / 2) < pane[0]
    inside = inside & (np.abs(v % high - high / 2) < pane[1]) & (v < tall - 0.6)
    shine = 0.6 + 0.9 * canvas.cell(u / wide, v / high)
    colors = np.where(inside[..., None], glass * shine[..., None], colors)
    edge = (v > tall - 0.35) | (np.abs(v - high) < 0.12)
    colors = np.where(edge[..., None], base * 0.75, colors) * light
    canvas.paint(part, (v > 0) & (v < tall), street_canvas.BUILDING, colors)


def _wall(draws: Draws) -> np.ndarray:
    """Gray, plaster or brick."""
    kind = draws.below(3)
    if kind == 0:
        return gray(draws, 0.25, 0.75, 0.06)
    warm = np.array([1.0, 0.85, 0.65]) if kind == 1 else np.array([0.75, 0.42, 0.32])
    return warm * draws.uniform(0.45, 0.95)


# --- Ground ---------------------------------------------------------------------------


def ground(canvas: Canvas, street: Plan, draws: Draws) -> None:
    """Road, often with a dashed line, and sidewalks of slabs, in light and shadow."""
    above = int(np.sum(canvas.down <= 0))
    ahead = canvas.height / canvas.down[above:, None]
    across = canvas.right[None] * ahead
    part = Part((slice(above, HEIGHT), WHOLE), across, np.zeros((1, 1)), ahead)
    asphalt, paving = gray(draws, 0.22, 0.5), gray(draws, 0.3, 0.65, 0.12)
    curb, slab = draws.uniform(0.1, 0.3), draws.uniform(0.5, 1.2)
    middle = draws.uniform(-0.3, 0.3) + sum(street.road) / 2
    marked, white = draws.chance(0.8), draws.uniform(0.5, 0.9)
    near = np.clip(1 - ahead / 40, 0, 1)  # what is finer than pixels is left out
    grain = 1 + 0.25 * near * (canvas.noise(across * 12, ahead * 12) - 0.5)
    grain += 0.25 * (canvas.noise(across * 0.5, ahead * 0.2) - 0.5)
    light = _light(canvas, street, part, draws)
    line = (np.abs(across - middle) < 0.09) & (ahead % 9 < 4) & marked
    colors = np.where(line[..., None], white, asphalt * grain[..., None])
    off = np.maximum(street.road[0] - across, across - street.road[1])
    canvas.paint(part, off < 0, street_canvas.ROAD, colors * light)
    joint = near * ((across % slab < 0.06) | (ahead % slab < 0.06))
    colors = paving * (grain - 0.35 * joint)[..., None]
    colors = np.where((off < curb)[..., None], paving * 1.25, colors)
    canvas.paint(part, off >= 0, street_canvas.SIDEWALK, colors * light)


def _light(canvas: Canvas, street: Plan, part: Part, draws: Draws) -> np.ndarray:
    """On the ground: the houses of one side cast shadows over part of it."""
    left, right = street.fronts
    longest = draws.uniform(0.0, 0.8) * (right - left)
    reach = longest * (0.6 + 0.8 * canvas.cell(part.distance / 9, np.float64(5.0)))
    if street.sunny:
        shaded = part.across < left + reach
    else:
        shaded = part.across > right - reach
    return np.where(shaded, street.shade, 1.0)[..., None]
