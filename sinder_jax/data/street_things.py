"""What stands on a street: trees, poles, people and cars.

Plan, draws --stand--> Canvas with things in front of its scenery
"""

import numpy as np

from sinder_jax.data import street_canvas
from sinder_jax.data.augment import Draws
from sinder_jax.data.street_canvas import CAR, PERSON, POLE, VEGETATION, Canvas, gray
from sinder_jax.data.street_scenery import Plan

LAST = 60.0  # meters to the farthest tree, pole or parked car


def stand(canvas: Canvas, street: Plan, draws: Draws) -> None:
    """Rows of things at both curbs, cars on the road, and people."""
    for side in (0, 1):
        _row(canvas, street, side, draws)
    for _ in range(draws.below(3)):
        x = street.road[0] + draws.uniform(0.25, 0.75) * np.ptp(street.road)
        _car(canvas, float(x), draws.uniform(9.0, 45.0), draws)
    for _ in range(2 + draws.below(6)):
        side = draws.below(2)
        inner, outer = street.road[side], street.fronts[side]
        x = inner + draws.uniform(0.1, 0.9) * (outer - inner)
        if draws.chance(0.15):
            x = draws.uniform(*street.road)
        _person(canvas, x, draws.uniform(4.5, 20.0), draws)


def _row(canvas: Canvas, street: Plan, side: int, draws: Draws) -> None:
    """Parked cars, poles and trees along one side; any may be left out."""
    out, curb = (1 if side else -1), street.road[side]
    if draws.chance(0.75):
        z = draws.uniform(4.0, 16.0)
        while z < LAST:
            if draws.chance(0.7):
                _car(canvas, curb - out * 1.1, z, draws)
            z += 4.4 + draws.uniform(0.8, 5.0)
    if draws.chance(0.85):
        spacing, z = draws.uniform(9.0, 18.0), draws.uniform(5.0, 14.0)
        while z < LAST:
            _pole(canvas, curb + out * 0.35, z, -out, draws)
            z += spacing
    if draws.chance(0.55):
        spacing, z = draws.uniform(6.0, 14.0), draws.uniform(7.0, 14.0)
        while z < LAST:
            _tree(canvas, curb + out * 1.2, z, draws)
            z += spacing


def _tree(canvas: Canvas, x: float, z: float, draws: Draws) -> None:
    radius, stem = draws.uniform(1.2, 2.3), draws.uniform(0.1, 0.2)
    middle = 2.2 + radius * draws.uniform(0.7, 1.1)
    base, bark = street_canvas.green(draws), gray(draws, 0.15, 0.35, 0.15)
    reach = 1.4 * radius
    part = canvas.facing((x - reach, x + reach), (0.0, middle + reach), z)
    u, v = part.across - x, part.up - middle
    ragged = 0.75 + 0.6 * canvas.noise(u * 1.5 + 2 * z, v * 1.5)
    shade = street_canvas.leaves(canvas, u + z, v)
    shade = shade * (1 + 0.25 * np.clip(v / radius, -1, 1))
    crown = u**2 + v**2 < (radius * ragged) ** 2
    canvas.paint(part, crown, VEGETATION, base * shade[..., None])
    canvas.paint(part, (np.abs(u) < stem) & (v < 0), VEGETATION, bark)


def _pole(canvas: Canvas, x: float, z: float, toward: int, draws: Draws) -> None:
    """A lamp on an arm over the road, or a round sign."""
    tall, thick = draws.uniform(3.0, 7.5), draws.uniform(0.08, 0.16)
    metal, color = gray(draws, 0.15, 0.6), street_canvas.any_color(draws)
    part = canvas.facing((x - 2.2, x + 2.2), (0.0, tall + 0.2), z)
    u, up = (part.across - x) * toward, part.up
    if draws.chance(0.4):
        canvas.paint(part, u**2 + (up - 2.6) ** 2 < 0.45**2, POLE, color)
    else:
        arm = (u > 0) & (u < 1.8) & (np.abs(up - tall) < 0.09)
        lamp = (u > 1.2) & (u < 2.0) & (np.abs(up - tall + 0.05) < 0.16)
        canvas.paint(part, arm | lamp, POLE, metal)
    canvas.paint(part, (np.abs(u) < thick) & (up < tall), POLE, metal)


def _person(canvas: Canvas, x: float, z: float, draws: Draws) -> None:
    tall, wide = draws.uniform(1.5, 1.9), draws.uniform(0.19, 0.27)
    skin = np.array([0.9, 0.7, 0.55]) * draws.uniform(0.4, 1.0)
    top = street_canvas.any_color(draws)
    bottom = street_canvas.any_color(draws, 0.05, 0.5)
    step, hair = draws.uniform(0.0, 0.22), gray(draws, 0.05, 0.5, 0.3)
    part = canvas.facing((x - 0.6, x + 0.6), (0.0, tall), z)
    u, up, hip, neck = part.across - x, part.up, 0.5 * tall, tall - 0.27
    head = (u / 0.11) ** 2 + ((up - tall + 0.14) / 0.14) ** 2 < 1
    crown = np.broadcast_to(up > tall - 0.12, head.shape)[..., None]
    canvas.paint(part, head, PERSON, np.where(crown, hair, skin))
    body = (np.abs(u) < wide * (0.8 + 0.2 * (up - hip))) & (up >= hip) & (up < neck)
    canvas.paint(part, body, PERSON, top)
    arms = (np.abs(np.abs(u) - wide) < 0.06) & (up > 0.42 * tall) & (up < neck - 0.03)
    canvas.paint(part, arms, PERSON, top * 0.85)
    spread = 0.09 + step * (1 - up / hip)
    legs = (np.abs(np.abs(u) - spread) < 0.085) & (up < hip)
    canvas.paint(part, legs, PERSON, bottom)


# --- Cars -----------------------------------------------------------------------------

HALF = 0.9  # meters of a car's width
WAIST = 0.58  # of a car's height, where its windows begin


def _car(canvas: Canvas, x: float, z: float, draws: Draws) -> None:
    """Its back or front, and the side towards the camera."""
    paint = gray(draws, 0.05, 0.9)
    if draws.chance(0.4):
        paint = street_canvas.any_color(draws)
    long, roof = draws.uniform(3.6, 4.8), draws.uniform(1.35, 1.75)
    lights = np.array([0.7, 0.1, 0.1]) if draws.chance(0.7) else np.full(3, 0.95)
    glass = gray(draws, 0.08, 0.3, 0.15)
    part = canvas.facing((x - HALF, x + HALF), (0.0, roof), z)
    u, up, waist = np.abs(part.across - x), part.up, WAIST * roof
    side = HALF - 0.3 * np.maximum(up - waist, 0) / (roof - waist)
    shade = 0.75 + 0.35 * np.clip(up / roof, 0, 1)
    pane = (u < side - 0.12) & (up > waist + 0.04) & (up < roof - 0.1)
    colors = np.where(pane[..., None], glass, paint * shade[..., None])
    lamp = (u > HALF - 0.32) & (np.abs(up - waist + 0.18) < 0.09)
    colors = np.where(lamp[..., None], lights, colors)
    plate = (u < 0.26) & (np.abs(up - 0.5) < 0.06)
    colors = np.where(plate[..., None], 0.85, colors)
    canvas.paint(part, (u < side) & (up > 0.28), CAR, colors)
    canvas.paint(part, (u > HALF - 0.26) & (u < HALF - 0.04) & (up <= 0.3), CAR, 0.05)
    _car_side(canvas, x - np.sign(x) * HALF, (z, long, roof), paint, glass)


def _car_side(
    canvas: Canvas,
    x: float,
    sizes: tuple[float, float, float],
    paint: np.ndarray,
    glass: np.ndarray,
) -> None:
    z, long, roof = sizes
    part = canvas.beside(x, (z, z + long))
    u, up, waist = part.across - z, part.up, WAIST * roof
    slant = 0.9 * (up - waist) / (roof - waist)
    back, front = 0.1 + 0.4 * slant, 0.74 * long - slant
    wheels = [
        (u - axle) ** 2 + (up - 0.32) ** 2 < 0.32**2
        for axle in (0.2 * long, 0.8 * long)
    ]
    canvas.paint(part, wheels[0] | wheels[1], CAR, 0.06)
    cabin = (u > back) & (u < front) & (up >= waist) & (up < roof)
    pane = (u > back + 0.3) & (u < front - 0.25) & (np.abs(u - 1.6) > 0.06)
    pane = pane & (up > waist + 0.05) & (up < roof - 0.1)
    colors = np.where(pane[..., None], glass, paint * 0.8)
    canvas.paint(part, cabin | ((up > 0.28) & (up < waist)), CAR, colors)
