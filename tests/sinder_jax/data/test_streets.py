import functools

import numpy as np
import pytest

from sinder_jax.data import scenes, street_canvas, streets
from sinder_jax.data.masks import IGNORE
from sinder_jax.data.street_canvas import PERSON, POLE, ROAD, SKY
from sinder_jax.data.streets import Street
from sinder_jax.evals import metrics

SOME = {"train": 24, "val": 8}


@functools.cache
def some(split):
    return [each.read() for each in streets.scenes(split)[: SOME[split]]]


def test_a_street_is_drawn_from_its_number_alone():
    first, other = Street("train", 3).read(), Street("train", 4).read()
    streets._drawn.cache_clear()
    again = Street("train", 3).read()
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(Street("train", 3).read_mask(), first[1])
    assert (first[0] != other[0]).mean() > 0.5 and (first[1] != other[1]).mean() > 0.05
    first[0][:], first[1][:] = 0, 0  # one's own
    assert Street("train", 3).read()[0].any()


def test_streets_have_a_layout():
    for pixels, mask in some("train"):
        assert pixels.shape == (256, 512, 3) and mask.shape == (256, 512)
        assert (mask[:80] != ROAD).all() and (mask[-60:] != SKY).all()
        assert (mask[-40:-25, 200:300] == ROAD).mean() > 0.25
        assert 0 < (mask == IGNORE).mean() < 0.1 and (mask[:200] != IGNORE).all()


def test_every_class_is_in_both_splits():
    for split in streets.NUMBERS:
        labels, counts = np.unique(
            np.stack([mask for _, mask in some(split)]), return_counts=True
        )
        assert labels.tolist() == [*range(8), IGNORE]
        shares = counts[:8] / counts.sum()
        assert shares.min() > 0.004 and shares.argmin() in (PERSON, POLE)


def test_colors_do_not_give_the_classes_away():
    """The most frequent class of each color is often wrong."""

    def code(pixels):
        return np.ravel_multi_index(np.moveaxis(pixels >> 4, -1, 0), (16,) * 3)

    counts, total = np.zeros((16**3, 8)), 0
    for pixels, mask in some("train"):
        valid = mask != IGNORE
        np.add.at(counts, (code(pixels)[valid], mask[valid]), 1)
    for pixels, mask in some("val"):
        found = counts.argmax(1)[code(pixels)]
        total = total + metrics.confusion_matrix(mask, found, 8)
    assert metrics.segmentation_scores(total).miou < 0.4


def test_names_and_colors_are_those_of_cityscapes():
    found = scenes.open_scenes("sample:streets")
    assert found.classes[ROAD] == "road" and found.palette[ROAD] == (128, 64, 128)
    assert found.classes[SKY] == "sky" and found.palette[SKY] == (70, 130, 180)


# --- The canvas -----------------------------------------------------------------------


@pytest.fixture
def canvas():
    draws, bits = streets.Draws(0, 0), np.random.PCG64(0)
    return street_canvas.canvas(draws, bits)


def test_the_nearest_is_seen_in_any_order(canvas):
    for distance, label in ((10.0, 1), (5.0, 2), (20.0, 3)):
        part = canvas.facing((-1.0, 1.0), (0.0, 4.0), distance)
        seen = np.ones(canvas.classes[part.box].shape, bool)
        canvas.paint(part, seen, label, [0.1 * label] * 3)
        where = canvas.classes == label
        assert where.any() == (label != 3)
        assert (canvas.distance[where] == distance).all()
        assert np.allclose(canvas.colors[where], 0.1 * label)


def test_parts_follow_the_rays(canvas):
    """What is twice as far is half as high; a plane beside is met where x = X / Z."""
    sizes = []
    for distance in (5.0, 10.0):
        part = canvas.facing((-1.0, 1.0), (0.0, 2.0), distance)
        sizes.append([s.stop - s.start for s in part.box])
        assert part.across.min() >= -1 and part.up.max() < 2
    assert np.allclose(sizes[0], np.multiply(sizes[1], 2), atol=2)
    part = canvas.beside(-3.0, (4.0, 9.0))
    rays = canvas.right[None, part.box[1]]
    assert np.allclose(rays * part.distance, -3.0)
    assert 4 <= part.distance.min() and part.distance.max() < 9


def test_noise_goes_through_its_lattice_and_repeats(canvas):
    u, v = np.meshgrid(np.arange(-3.0, 70.0), np.arange(5.0))
    at = canvas.lattice[v.astype(int) % 64, u.astype(int) % 64]
    assert np.array_equal(canvas.noise(u, v), at)
    assert np.array_equal(canvas.cell(u + 0.4, v + 0.9), at)
    between = canvas.noise(np.array([2.5]), np.array([7.0]))
    assert np.allclose(between, canvas.lattice[7, 2:4].mean())
