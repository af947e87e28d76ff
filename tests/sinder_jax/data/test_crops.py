import dataclasses
import io
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import scene_trees
from samples import error_of
from sinder_jax.data import crops, decode, scenes


@dataclasses.dataclass(frozen=True)
class Made:
    """A scene of noise, or of labels by position."""

    height: int
    width: int
    number: int = 0

    @property
    def name(self):
        return f"made{self.number}"

    def stamp(self):
        return None

    def check(self, num_classes):
        raise NotImplementedError

    def read(self):
        rng = np.random.default_rng(self.number)
        shape = (self.height, self.width)
        return rng.integers(0, 256, (*shape, 3), np.uint8), rng.integers(
            0, 256, shape, np.uint8
        )

    def read_mask(self):
        return self.read()[1]


# --- Squares --------------------------------------------------------------------------


def pillow_square(array, size):
    """torchvision's transforms of a Pillow image, pixel by pixel, without Pillow."""
    height, width = array.shape[:2]
    if height < width:
        new = (size, int(size * width / height))
    else:
        new = (int(size * height / width), size)
    index = []
    for old, length in zip((height, width), new, strict=True):
        step = old / length
        at, places = 0.5 * step, []
        for _ in range(length):  # Pillow adds up the steps
            places.append(int(at))
            at += step
        start = int(round((length - size) / 2.0))
        index.append(places[start : start + size])
    return array[np.ix_(*index)]


SIDES = [(1, 1), (7, 7), (100, 333), (375, 500), (500, 375), (512, 1024), (200, 200)]


@pytest.mark.parametrize("shape", SIDES)
def test_a_square_is_pillows_nearest_neighbor(shape):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
    for size in (1, 14, 98, 99, 224, 322, 392, 560):
        wanted = pillow_square(pixels, size)
        assert np.array_equal(crops.square(pixels, size), wanted)
        assert np.array_equal(crops.square(pixels[..., 1], size), wanted[..., 1])
        squashed = crops.square(pixels, size, squash=True)
        by_pillow = Image.fromarray(pixels).resize((size, size), 0)
        assert np.array_equal(squashed, by_pillow) and squashed.shape == (size, size, 3)


def test_a_square_follows_pillow_where_the_formula_is_a_whole_number():
    """Pillow adds up steps in float64, and may end just below a whole number."""
    array = np.random.default_rng(0).integers(0, 256, (512, 512), np.uint8)
    differing = []
    for size in range(98, 513, 7):
        exact = (2 * np.arange(size) + 1) * 512 // (2 * size)
        got = crops.square(array, size)
        if not np.array_equal(got, array[np.ix_(exact, exact)]):
            differing.append(size)
        assert np.array_equal(got, pillow_square(array, size))
    assert differing  # else nothing would tell the two rules apart


# --- Crops ----------------------------------------------------------------------------


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=75)
    return np.asarray(Image.open(file))


def boxes(height, width, crop_height, crop_width):
    """torchvision's `five_crop`."""
    top, left = height - crop_height, width - crop_width
    middle = int(round(top / 2.0)), int(round(left / 2.0))
    for y, x in ((0, 0), (0, left), (top, 0), (top, left), middle):
        yield slice(y, y + crop_height), slice(x, x + crop_width)


@pytest.mark.parametrize("shape", [(64, 128), (65, 131), (63, 90), (6, 10)])
def test_five_crops(shape):
    made = [Made(*shape, number) for number in range(2)]
    found = crops.five(made)
    assert [crop.name for crop in found[:6]] == [
        *(f"made0#five{k}" for k in range(5)),
        "made1#five0",
    ]
    for i, crop in enumerate(found):
        pixels, mask = made[i // 5].read()
        box = list(boxes(*shape, shape[0] // 2, shape[1] // 2))[i % 5]
        got, labels = crop.read()
        assert np.array_equal(labels, mask[box])
        assert np.array_equal(crop.read_mask(), mask[box])
        assert np.array_equal(got, jpeg(np.ascontiguousarray(pixels[box])))
        assert not np.array_equal(got, pixels[box])  # JPEG changes noise


def test_super_crops():
    made = [Made(70, 113, number) for number in range(2)]
    found = crops.super_crops(made)
    assert len(found) == 100 and found[49].name == "made0#super49"
    expected = []
    for scene in made:
        pixels, mask = scene.read()
        for share in (0.3, 0.4, 0.5, 0.6, 0.7):
            size = int(70 * share), int(113 * share)
            for flip in (1, -1):
                for box in boxes(70, 113, *size):
                    expected.append((pixels[:, ::flip][box], mask[:, ::flip][box]))
    for crop, (pixels, mask) in zip(found, expected, strict=True):
        got, labels = crop.read()
        assert np.array_equal(labels, mask)
        assert np.array_equal(crop.read_mask(), mask)
        assert np.array_equal(got, jpeg(np.ascontiguousarray(pixels)))


def test_crops_of_files(tmp_path):
    root = scene_trees.own(tmp_path)
    found = scenes.open_scenes(str(root)).train
    crop = crops.five(found)[3]
    assert crop.name == f"{root}/train/images/0.jpg#five3"
    assert crop.stamp() == found[0].stamp()
    assert np.array_equal(crop.read()[1], found[0].read()[1][12:, 18:])
    for suffix in ("images/0.jpg", "masks/0.png"):
        (root / "train" / suffix).write_bytes(b"")
    said = error_of(crop.read, kind=decode.UnreadableImage)
    assert said.startswith(str(root)) and "not an image" in said
    small = crops.super_crops([Made(3, 40)])[0]
    said = error_of(small.read, kind=decode.UnreadableImage)
    assert said == "made0: 40 x 3 pixels are too few for crops with 0.3 of each side"


def test_crops_read_in_order_decode_each_scene_once(monkeypatch):
    decoded, lock, read = [], threading.Lock(), Made.read

    def slow(self):
        with lock:
            decoded.append(self.number)
        time.sleep(0.002)
        return read(self)

    monkeypatch.setattr(Made, "read", slow)
    found = crops.five([Made(21, 22, 1000 + number) for number in range(12)])
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(crops.Crop.read, found))
    assert sorted(decoded) == list(range(1000, 1012))
    for crop, (pixels, mask) in zip(found, results, strict=True):
        assert np.array_equal(mask, crop.read()[1])
        pixels[:], mask[:] = 0, 0  # one's own
        assert crop.read()[1].any()


def test_an_error_is_not_kept(monkeypatch):
    crop, read = crops.five([Made(20, 20, 77)])[0], Made.read

    def failing(self):
        raise decode.UnreadableImage("made77: away")

    monkeypatch.setattr(Made, "read", failing)
    assert error_of(crop.read, kind=decode.UnreadableImage) == "made77: away"
    monkeypatch.setattr(Made, "read", read)
    assert crop.read()[1].shape == (10, 10)


def test_crops_can_be_sent_to_workers():
    found = crops.five(scenes.open_scenes("sample:mosaics").val[:2])
    assert pickle.loads(pickle.dumps(found)) == found
    assert isinstance(found[0], scenes.AnyScene)
    assert found[5].read()[1].shape == (120, 160)
