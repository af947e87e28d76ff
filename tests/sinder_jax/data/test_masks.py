import numpy as np
import pytest
from PIL import Image

from samples import error_of
from sinder_jax.data import masks

NUMBERS = np.array([[0, 1, 255], [7, 150, 2]], np.uint8)


def saved(path, image):
    image.save(path)
    return masks.read(path, "the mask")


def test_numbers_are_read_from_any_lossless_image(tmp_path):
    gray = Image.fromarray(NUMBERS)
    palette = gray.convert("P")
    palette.putdata(list(NUMBERS.ravel()))
    palette.putpalette([i * 7 % 256 for i in range(768)])
    wide = Image.fromarray(NUMBERS.astype(np.uint16))
    colors = Image.merge("RGB", [gray] * 3)
    for i, image in enumerate((gray, palette, wide, colors)):
        assert np.array_equal(saved(tmp_path / f"{i}.png", image), NUMBERS), image.mode
    bits = Image.fromarray(NUMBERS == 7)
    assert np.array_equal(saved(tmp_path / "bits.png", bits), NUMBERS == 7)


@pytest.mark.parametrize(
    "name, image, said",
    [
        ("a.png", Image.new("RGB", (3, 2), (1, 2, 3)), "a mask of colors"),
        ("a.jpg", Image.new("L", (3, 2)), "a JPEG, which changes the numbers"),
        ("a.png", Image.new("I;16", (3, 2), 300), "the number 300"),
        ("a.tif", Image.new("F", (3, 2)), "mode F"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path, name, image, said):
    message = error_of(saved, tmp_path / name, image)
    assert message.startswith("the mask: ") and said in message


def test_damaged_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert "not an image" in error_of(masks.read, tmp_path / "a.png", "the mask")
    assert "No such file" in error_of(masks.read, tmp_path / "b.png", "the mask")


def test_classes_are_counted_from_the_first():
    want = [[255, 0, 255], [6, 149, 1]]
    assert masks.counted_from(NUMBERS, 1).tolist() == want
    assert masks.counted_from(NUMBERS, 0) is NUMBERS
    ids = np.array([[0, 6, 7, 33, 254, 255]], np.uint8)
    assert masks.counted_from(ids, 7).tolist() == [[255, 255, 0, 26, 247, 255]]


def test_the_largest_label_is_not_255():
    assert masks.largest(np.array([[3, 255, 254]], np.uint8)) == 254
    assert masks.largest(np.full((2, 2), 255, np.uint8)) == -1
