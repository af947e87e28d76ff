import numpy as np
import pytest

from sinder_jax.data import opencv

cv2 = pytest.importorskip("cv2")


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "old, new",
    [
        ((50, 70), (123, 200)),
        ((120, 99), (40, 33)),
        ((64, 64), (32, 128)),
        ((37, 50), (37, 50)),
        ((7, 9), (3, 40)),
    ],
)
def test_resizes_equal_opencv(old, new):
    image = noise(*old)
    want = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(opencv.resize(image, new), want)
    mask = image[..., 0]
    want = cv2.resize(mask, new[::-1], interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(opencv.resize_nearest(mask, new), want)


def test_hue_and_saturation_equal_opencv():
    """Of all colors to 8 bits by 5, and of all hues, saturations and values by 3."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    colors = colors.reshape(52, -1, 3)
    assert np.array_equal(
        opencv.to_hsv(colors), cv2.cvtColor(colors, cv2.COLOR_RGB2HSV)
    )
    hues, some = np.arange(180, dtype=np.uint8), np.arange(0, 256, 3, dtype=np.uint8)
    colors = np.stack(np.meshgrid(hues, some, some, indexing="ij"), axis=-1)
    colors = colors.reshape(1, -1, 3)
    want = cv2.cvtColor(colors, cv2.COLOR_HSV2RGB)
    got = opencv.from_hsv(colors)
    # Rounded in another way where less than a vector of pixels is left.
    assert np.array_equal(got[:, :-64], want[:, :-64])
    assert np.abs(got.astype(int) - want).max() <= 1


def test_blue_green_red_is_no_other_case():
    """The originals keep images in this order; nothing here depends on it."""
    image = noise(20, 64)
    want = cv2.cvtColor(image[..., ::-1].copy(), cv2.COLOR_BGR2HSV)
    assert np.array_equal(opencv.to_hsv(image), want)
