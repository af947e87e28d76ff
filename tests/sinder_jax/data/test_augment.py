import math

import numpy as np
import pytest
from PIL import Image

from samples import error_of
from sinder_jax.data import augment
from sinder_jax.data.augment import Draws


class Given(Draws):
    """Draws that were written down: numbers from 0 to 1, in order."""

    def __init__(self, *numbers):
        self.numbers = [float(x) for x in numbers]

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * self.numbers.pop(0)


def gradient(width, height):
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1))


# --- Draws and order ------------------------------------------------------------------


def test_draws_depend_on_seed_and_number_only():
    first = [Draws(3, 7).uniform() for _ in range(2)]
    assert first[0] == first[1]
    assert len({Draws(*x).uniform() for x in [(3, 7), (3, 8), (4, 7), (7, 3)]}) == 4


def test_draws_are_raw_bits_of_pcg64():
    """A change would give every resumed run other crops."""
    assert Draws(0, 0).uniform() == pytest.approx(0.6369616873214543, abs=0)
    assert Draws(0, 0).below(1000) == 636


def test_draws_are_uniform():
    draws = Draws(1, 2)
    drawn = np.array([draws.uniform(2.0, 4.0) for _ in range(4000)])
    assert drawn.min() >= 2 and drawn.max() < 4
    assert drawn.mean() == pytest.approx(3, abs=5 * 2 / math.sqrt(12 * 4000))
    assert {draws.below(3) for _ in range(100)} == {0, 1, 2}


def test_every_pass_is_another_permutation():
    passes = [[augment.shuffled(p * 10 + i, 10, 5) for i in range(10)] for p in (0, 1)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert passes[0] != passes[1]
    assert passes[0] != [augment.shuffled(i, 10, 6) for i in range(10)]


# --- Classification -------------------------------------------------------------------


def test_box_has_the_area_and_aspect_that_were_drawn():
    # area 0.25·400·300 = 30,000, aspect 1: 173 x 173; top 127/2, left 227/2
    area, aspect = (0.25 - 0.08) / 0.92, 0.5
    box = augment.random_box(400, 300, Given(area, aspect, 0.5, 0.5))
    assert box == (114, 64, 173, 173)


def test_a_box_that_does_not_fit_is_drawn_again():
    # The whole area with aspect 4/3 is wider than a square image.
    draws = Given(1, 1, 0, 0.5, 0, 0)
    assert augment.random_box(100, 100, draws) == (0, 0, 28, 28)
    assert not draws.numbers


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 30), (480, 0, 40, 30)), ((30, 1000), (0, 480, 30, 40))],
    ids=["wide", "tall"],
)
def test_after_ten_tries_the_middle_is_taken(size, box):
    assert augment.random_box(*size, Given(*[1, 0.5] * 10)) == box


def test_boxes_stay_in_the_image():
    for number in range(300):
        left, top, width, height = augment.random_box(57, 31, Draws(0, number))
        assert 0 <= left and left + width <= 57
        assert 0 <= top and top + height <= 31
        assert 0.08 * 0.9 < width * height / (57 * 31) <= 1


def test_crop_is_pillows_bicubic_of_the_box():
    image = gradient(200, 100)
    got = augment.crop_and_flip(image, 32, Draws(0, 1))
    draws = Draws(0, 1)
    left, top, width, height = augment.random_box(200, 100, draws)
    box = image.crop((left, top, left + width, top + height)).resize((32, 32), 3)
    pixels = np.asarray(box)[:, ::-1] if draws.chance() else np.asarray(box)
    assert np.array_equal(np.asarray(got), pixels)


def test_half_of_the_crops_are_mirrored():
    image = gradient(100, 100)
    crops = [
        np.asarray(augment.crop_and_flip(image, 16, Draws(0, i))) for i in range(200)
    ]
    mirrored = sum(int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in crops)
    assert 70 < mirrored < 130


# --- Depth ----------------------------------------------------------------------------


def nyu():
    rows, columns = np.mgrid[:480, :640]
    image = np.stack([rows % 256, columns % 256, rows // 2], axis=-1).astype(np.uint8)
    return Image.fromarray(image), (1 + rows / 1000 + columns / 1e5).astype(np.float32)


def test_depth_example_without_chances_is_a_crop():
    image, depth = nyu()
    # no rotation, no flip, top 11 of 0..11, left 21 of 0..21, no colors
    example = augment.depth_example(image, depth, Given(0.9, 0.9, 0.999, 0.999, 0.9))
    rows, columns = slice(45 + 11, 472), slice(43 + 21, 608)
    assert np.array_equal(example.pixels, np.asarray(image)[rows, columns])
    assert np.array_equal(example.depth, depth[rows, columns])


def test_image_and_depth_are_mirrored_together():
    image, depth = nyu()
    example = augment.depth_example(image, depth, Given(0.9, 0, 0, 0, 0.9))
    columns = slice(607, 607 - 544, -1)
    assert np.array_equal(example.pixels, np.asarray(image)[45 : 45 + 416, columns])
    assert np.array_equal(example.depth, depth[45 : 45 + 416, columns])


def test_image_and_depth_turn_together():
    """Depth as the image's red: the nearest pixel differs by half a step at most."""
    rows = np.mgrid[:480, :640][0]
    gray = np.repeat((rows // 2).astype(np.uint8)[:, :, None], 3, axis=2)
    draws = Given(0, 1, 0.9, 0, 0, 0.9)
    example = augment.depth_example(
        Image.fromarray(gray), (rows // 2).astype(np.float32), draws
    )
    known = example.depth > 0
    assert known.mean() > 0.95 and not known.all()  # corners came from outside
    inner = (slice(30, -30), slice(30, -30))
    assert np.abs(example.pixels[..., 0] - example.depth)[inner].max() <= 1
    slope = example.depth[200, 500] - example.depth[200, 40]
    assert abs(slope) == pytest.approx(460 * math.tan(math.radians(2.5)) / 2, abs=1.5)


def test_colors_change_by_gamma_brightness_and_channel():
    pixels = np.full((2, 2, 3), 100, np.float32)
    got = augment.recolored(pixels, Given(1, 0, 0.5, 0, 1))
    want = 100**1.1 * 0.75 * np.array([1, 0.9, 1.1])
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-5)
    assert augment.recolored(pixels + 155, Given(1, 1, 1, 1, 1)).max() == 255


def test_an_image_of_another_size_is_refused():
    image, depth = nyu()
    message = error_of(
        augment.depth_example, image.crop((0, 0, 9, 9)), depth, Draws(0, 0)
    )
    assert "9 x 9" in message and "640 x 480" in message
    assert "depth map" in error_of(augment.depth_example, image, depth[:9], Draws(0, 0))
