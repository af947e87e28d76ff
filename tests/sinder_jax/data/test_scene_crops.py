import numpy as np
import pytest

from sinder_jax import families
from sinder_jax.data import opencv, scene_crops
from sinder_jax.data.augment import Draws
from sinder_jax.data.masks import IGNORE
from sinder_jax.data.scene_crops import Crop

STATISTICS = families.named("dinov2").statistics


def scene(height=40, width=60, seed=0):
    """Colors that tell the class: gray c for class c."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 5, (height // 10, width // 10), dtype=np.uint8)
    mask = np.repeat(np.repeat(small, 10, 0), 10, 1)
    return np.repeat(mask[..., None] * 40, 3, -1), mask


def crops(count=200, size=24, ratios=(0.5, 2.0), **options):
    pixels, mask = scene(**options)
    return [
        scene_crops.random_crop(pixels, mask, Draws(0, k), size=size, ratios=ratios)
        for k in range(count)
    ]


def test_a_crop_depends_on_its_draws_alone():
    one, two = crops(5), crops(5)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.mask, b.mask)
    assert not np.array_equal(one[0].mask, one[1].mask)


def test_small_photographs_give_small_crops():
    sizes = [crop.mask.shape for crop in crops(ratios=(0.5, 2.0))]
    assert min(height for height, _ in sizes) == 12
    assert max(max(size) for size in sizes) == 24
    assert all(crop.pixels.shape[:2] == crop.mask.shape for crop in crops(20))
    assert {crop.mask.shape for crop in crops(ratios=(1.0, 3.0))} == {(24, 24)}


def test_pixels_and_mask_stay_together(monkeypatch):
    """Resized, cut and mirrored alike: gray levels tell the class."""
    monkeypatch.setattr(scene_crops, "distorted", lambda pixels, draws: pixels)
    for crop in crops(50):
        level = crop.pixels[..., 0] / 40
        # Bilinear and nearest differ within a pixel of an edge.
        assert np.mean(np.abs(level - crop.mask) < 0.3) > 0.75


def test_half_of_the_crops_are_mirrored(monkeypatch):
    monkeypatch.setattr(scene_crops, "distorted", lambda pixels, draws: pixels)
    ramp = np.tile(np.arange(60, dtype=np.uint8), (40, 1))
    pixels = np.repeat(ramp[..., None], 3, -1)
    mask = (ramp // 2).astype(np.uint8)
    found = [
        scene_crops.random_crop(pixels, mask, Draws(1, k), size=24, ratios=(1.0, 1.0))
        for k in range(400)
    ]
    mirrored = np.mean([crop.mask[0, 0] > crop.mask[0, -1] for crop in found])
    assert 0.4 < mirrored < 0.6  # 5 sigma are 0.125


def test_a_crop_of_mostly_one_class_is_not_mixed():
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 75:] = 1
    assert not scene_crops.is_mixed(mask)  # exactly 75 % are of one class
    mask[0, 0] = 1
    assert scene_crops.is_mixed(mask)
    mask[:, :75] = IGNORE
    assert not scene_crops.is_mixed(mask)


def test_crops_are_drawn_up_to_eleven_times(monkeypatch):
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 95:] = 1
    mask[:50, 75:95] = 1
    pixels = np.zeros((100, 100, 3), np.uint8)

    def share_of_mixed():
        found = (
            scene_crops.random_crop(
                pixels, mask, Draws(0, k), size=30, ratios=(3.3, 3.4)
            )
            for k in range(400)
        )
        return np.mean([scene_crops.is_mixed(crop.mask) for crop in found])

    monkeypatch.setattr(scene_crops, "TRIES", 0)
    once = share_of_mixed()
    monkeypatch.setattr(scene_crops, "TRIES", 2)
    # 5 standard deviations of a share of 400 are 0.125.
    assert share_of_mixed() == pytest.approx(1 - (1 - once) ** 3, abs=0.125)
    assert 0.05 < once < 0.5


def test_a_photograph_without_labels_is_cropped_all_the_same():
    pixels, nothing = (
        np.zeros((40, 40, 3), np.uint8),
        np.full((40, 40), IGNORE, np.uint8),
    )
    crop = scene_crops.random_crop(
        pixels, nothing, Draws(0, 0), size=30, ratios=(1.0, 1.0)
    )
    assert (crop.mask == IGNORE).all()


def test_colors_are_distorted_within_their_limits():
    gray = np.full((4, 4, 3), 100, np.uint8)
    found = [scene_crops.distorted(gray, Draws(0, k)) for k in range(500)]
    levels = np.array([image[0, 0, 0] for image in found])
    assert 0.1 < np.mean(levels == 100) < 0.4  # neither brightness nor contrast: 1/4
    assert levels.min() < 50 and levels.max() > 180
    assert levels.min() >= 34 and levels.max() <= 198  # (100 ± 32) · (1 ± ½)
    # A gray has no hue, and keeps none but for rounding.
    assert all(np.ptp(image[0, 0].astype(int)) <= 1 for image in found)
    red = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    found = [scene_crops.distorted(red, Draws(0, k)) for k in range(400)]
    assert len({tuple(image[0, 0]) for image in found}) > 300
    hues = np.array([int(opencv.to_hsv(image)[0, 0, 0]) for image in found])
    turns = (hues + 90) % 180 - 90
    # From -18 to 17, half of them 0; 8-bit colors hold a hue to 1 or 2.
    assert -20 <= turns.min() < -14 and 14 < turns.max() <= 19
    assert 0.3 < np.mean(np.abs(turns) <= 1) < 0.7


def test_crops_are_padded_after_normalization():
    crop = Crop(np.full((10, 12, 3), 255, np.uint8), np.full((10, 12), 3, np.uint8))
    images, labels = scene_crops.collate([crop], 16, (5, 7), STATISTICS)
    assert images.shape == (1, 28, 28, 3) and labels.shape == (1, 16, 16)
    inside = np.s_[0, 5:15, 5:17]
    white = [(1 - m) / s for m, s in zip(*STATISTICS, strict=True)]
    np.testing.assert_allclose(
        images[inside], np.broadcast_to(white, (10, 12, 3)), rtol=1e-6
    )
    assert np.count_nonzero(images) == 10 * 12 * 3
    assert (labels[0, :10, :12] == 3).all() and (labels == IGNORE).sum() == 256 - 120


@pytest.mark.parametrize(
    "height, width, short, want",
    [
        (512, 683, 640, (640, 854)),
        (375, 500, 512, (512, 683)),
        (500, 333, 512, (769, 512)),
    ],
)
def test_the_short_side_decides_the_size(height, width, short, want):
    assert scene_crops.resized_to(height, width, short) == want
