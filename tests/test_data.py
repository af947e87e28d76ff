"""data.py: order of files, decoding, torchvision's sizes, the stream of batches."""

import itertools
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sinder_jax import data


def save_noise(path: Path, width: int = 40, height: int = 30, seed: int = 0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


# --- Files ----------------------------------------------------------------------------


def test_files_are_sorted_by_relative_path_as_bytes(tmp_path):
    # "." (0x2e) is below "/" (0x2f), capitals are below small letters, é above z.
    expected = [
        "B.JPG",
        "Z/a.webp",
        "a.jpg",
        "n01/x10.JPEG",
        "n01/x9.JPEG",
        "sub.jpg",
        "sub/c.PnG",
        "zebra.jpeg",
        "é.png",
    ]
    for name in reversed(expected):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("notes.txt", "sub/c.gif", "jpg", "a.jpg.part"):
        (tmp_path / name).touch()
    found = data.list_images(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in found] == expected


def test_a_folder_with_an_image_suffix_is_searched_not_listed(tmp_path):
    save_noise(tmp_path / "album.jpg" / "photo.png")
    assert data.list_images(tmp_path) == [tmp_path / "album.jpg" / "photo.png"]


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    save_noise(tmp_path / "images" / "a.png")
    save_noise(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    found = data.list_images(tmp_path / "images")
    assert [file.name for file in found] == ["a.png", "b.png"]


def test_missing_empty_and_wrong_folders_raise_with_their_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.list_images(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"no images in .*\.jpg, \.jpeg, \.png, \.webp"
    ):
        data.list_images(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"not a folder but a file: .*a\.png"):
        data.list_images(tmp_path / "a.png")


@pytest.mark.parametrize(
    "total, wanted, step",
    [(10, 3, 3), (10, 10, 1), (10, 30_000, 1), (9, 2, 4), (1_281_167, 30_000, 42)],
)
def test_training_list_takes_every_nth_file(total, wanted, step):
    files = [Path(str(i)) for i in range(total)]
    chosen = data.training_list(files, wanted)
    assert chosen == [Path(str(i)) for i in range(0, total, step)]


def test_training_list_of_nothing_raises():
    with pytest.raises(ValueError, match="num_images is 0"):
        data.training_list([Path("a")], 0)


def test_sample_images_are_color_photographs_in_order():
    files = data.sample_images()
    names = [file.name for file in files]
    assert names == sorted(names) and len(names) >= 6
    assert {"astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"} <= set(names)
    for file in files:
        pixels = np.asarray(data.read_rgb(file), np.float64)
        assert min(pixels.shape[:2]) >= 224
        spread = np.abs(pixels - pixels.mean(axis=2, keepdims=True)).mean()
        assert spread > 3, f"{file.name} is gray"  # levels of 255; the least is 6


def test_importing_data_and_listing_samples_loads_no_heavy_library():
    code = (
        "import sys; from sinder_jax import data; data.sample_images(); "
        "print(sorted({'jax', 'grain', 'skimage', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- Decoding -------------------------------------------------------------------------


def test_rgb_files_keep_their_pixels(tmp_path):
    pixels = save_noise(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(data.read_rgb(tmp_path / "a.png")), pixels)


def test_a_png_called_jpeg_is_read(tmp_path):
    pixels = save_noise(tmp_path / "a.JPEG", format="PNG")  # as n02105855_2933.JPEG
    np.testing.assert_array_equal(
        np.asarray(data.read_rgb(tmp_path / "a.JPEG")), pixels
    )


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    save_noise(tmp_path / "a.jpg", width=40, height=30, exif=exif)
    assert data.read_rgb(tmp_path / "a.jpg").size == (40, 30)


def test_large_jpegs_are_decoded_at_full_size(tmp_path):
    save_noise(tmp_path / "a.jpg", width=1200, height=900)
    image = data.read_rgb(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as direct:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(direct))


def test_16_bit_gray_keeps_the_high_byte(tmp_path):
    levels = np.array([[0, 255, 256, 32768, 65279, 65280, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    red = np.asarray(data.read_rgb(tmp_path / "a.png"))[0, :, 0]
    np.testing.assert_array_equal(red, [0, 0, 1, 128, 254, 255, 255])


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.array([[(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    pixels = np.asarray(data.read_rgb(tmp_path / "rgba.png"))[0].tolist()
    # 51/255 is a fifth: 0.8 · 255 = 204.
    assert pixels == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]

    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    pixels = np.asarray(data.read_rgb(tmp_path / "palette.png"))[0].tolist()
    assert pixels == [[200, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("1", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
        ("RGB", "webp"),
    ],
)
def test_other_modes_give_rgb_of_the_same_brightness(tmp_path, mode, suffix):
    gray = Image.new("RGB", (24, 16), (128, 128, 128))
    gray.paste((255, 255, 255), (0, 0, 12, 16))
    if mode == "1":
        gray.paste((0, 0, 0), (12, 0, 24, 16))
    path = tmp_path / f"a.{suffix}"
    # Without "adaptive" Pillow dithers to the 216 colors of the web.
    gray.convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    pixels = np.asarray(data.read_rgb(path)).astype(int)
    assert pixels.shape == (16, 24, 3)
    # 6 levels: JPEG and WebP are lossy, and CMYK goes through ink and back.
    assert np.abs(pixels[:, :8] - 255).max() <= 6
    assert np.abs(pixels[:, -8:] - (0 if mode == "1" else 128)).max() <= 6


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises an image of any size in a few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x")


def write_broken(folder: Path) -> dict[str, str]:
    """Writes one broken file of each kind; name -> what its message must say."""
    save_noise(folder / "whole.jpg", width=200, height=200)
    save_noise(folder / "whole.png", width=200, height=200)
    for name in ("whole.jpg", "whole.png"):
        content = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not a picture")
    (folder / "page.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "thin.png").write_bytes(png_header(20_000, 20))
    (folder / "folder.png").mkdir()
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "float.tiff")
    return {
        "cut_whole.jpg": "truncated",
        "cut_whole.png": "",
        "empty.jpg": "not an image",
        "text.jpg": "not an image",
        "page.jpg": "not an image",  # EPS, which Pillow gives to Ghostscript
        "bomb.png": "decompression bomb",
        "thin.png": "20000 x 20 pixels is more than 100 times",
        "folder.png": "[Dd]irectory",
        "float.tiff": "32-bit",
        "nowhere.png": "No such file",
    }


def test_every_broken_file_raises_with_its_path_and_reason(tmp_path):
    for name, reason in write_broken(tmp_path).items():
        with pytest.raises(data.UnreadableImage, match=f"{name}: .*{reason}"):
            data.read_rgb(tmp_path / name)


# --- Resizing, cropping ---------------------------------------------------------------


def ramp(width: int, height: int) -> Image.Image:
    """Red counts columns, green counts rows, so that a crop says where it was cut."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    "width, height, resized",
    [
        (640, 480, (690, 518)),  # 518·640/480 = 690.67
        (480, 640, (518, 690)),
        (518, 518, (518, 518)),
        (100, 100, (518, 518)),
        (500, 375, (690, 518)),
        (333, 500, (518, 777)),  # 777.78: rounded down
        (1033, 517, (1034, 518)),  # 1034.998
        (3, 4000, (518, 690_666)),  # beyond MAX_ASPECT only reading refuses
    ],
)
def test_the_long_side_is_rounded_down(monkeypatch, width, height, resized):
    sizes = []
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, filter: (
            sizes.append((size, filter)) or Image.new("RGB", size)
        ),
    )
    data.training_crop(Image.new("RGB", (width, height)))
    assert sizes == [(resized, Image.Resampling.BICUBIC)]


@pytest.mark.parametrize(
    "surplus, first",
    # (side - size)/2 rounded half to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4.
    [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (11, 6), (13, 6)],
)
def test_the_crop_starts_at_half_the_surplus_half_to_even(surplus, first):
    # The short side is right already, so nothing is resampled.
    landscape = np.asarray(data.training_crop(ramp(28 + surplus, 28), 28))
    assert landscape.shape == (28, 28, 3)
    np.testing.assert_array_equal(landscape[0, :, 0], first + np.arange(28))
    np.testing.assert_array_equal(landscape[:, 0, 1], np.arange(28))
    portrait = np.asarray(data.training_crop(ramp(28, 28 + surplus), 28))
    np.testing.assert_array_equal(portrait[:, 0, 1], first + np.arange(28))
    np.testing.assert_array_equal(portrait[0, :, 0], np.arange(28))


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """Antialiased cubic (a = -0.5) from `old` to `new` samples, as a float64 matrix."""
    stretch = max(old / new, 1.0)
    centers = (np.arange(new) + 0.5) * old / new
    x = np.abs(np.arange(old)[None, :] + 0.5 - centers[:, None]) / stretch
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("width, height", [(97, 61), (20, 33), (61, 15)])
def test_crop_matches_an_antialiased_cubic_filter_written_out(width, height):
    size = 28
    image = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    )
    short = min(width, height)
    new_width, new_height = int(size * width / short), int(size * height / short)
    pixels = np.asarray(image, np.float64)
    across = np.einsum("xw,hwc->hxc", bicubic_weights(width, new_width), pixels)
    across = np.clip(np.rint(across), 0, 255)  # Pillow keeps 8 bits between the passes
    both = np.einsum("yh,hxc->yxc", bicubic_weights(height, new_height), across)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    expected = np.clip(both, 0, 255)[top : top + size, left : left + size]
    got = np.asarray(data.training_crop(image, size), np.float64)
    # Half a level for rounding, twice half a level for the pass in between, whose
    # weights add up to at most 1.3 in absolute value.
    assert np.abs(got - expected).max() < 1.2
    bilinear = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    other = np.asarray(bilinear.crop((left, top, left + size, top + size)), float)
    assert np.abs(other - expected).max() > 5  # the filter matters


@pytest.mark.parametrize(
    "width, height, short_side, expected",
    [
        (640, 480, 518, (686, 518)),  # 690 trimmed to 49 patches
        (480, 640, 518, (518, 686)),
        (840, 615, 518, (700, 518)),  # 707.5 -> 707 -> 700
        (640, 480, 896, (1190, 896)),  # 1194.67 -> 1194 -> 1190
        (3000, 1000, 896, (1792, 896)),  # 2688 trimmed to 1792
        (1000, 3000, 896, (896, 1792)),
        (14, 14, 14, (14, 14)),
    ],
)
def test_visual_resize_keeps_the_aspect_and_whole_patches(
    width, height, short_side, expected
):
    image = data.visual_resize(Image.new("RGB", (width, height)), short_side)
    assert image.size == expected


def test_visual_resize_trims_right_and_bottom_only():
    pixels = np.asarray(data.visual_resize(ramp(40, 28), 28, max_side=28))
    np.testing.assert_array_equal(pixels, np.asarray(ramp(40, 28))[:28, :28])


@pytest.mark.parametrize("side", [0, -14, 13, 500, 519])
def test_sizes_that_are_no_whole_patches_raise_with_sizes_near_them(side):
    image = Image.new("RGB", (50, 50))
    for call in (data.training_crop, data.visual_resize):
        with pytest.raises(ValueError, match=f"is {side} pixels.* multiple of .*14"):
            call(image, side)
    with pytest.raises(ValueError, match="such as 504 or 518"):
        data.training_crop(image, 510)


# --- Normalizing ----------------------------------------------------------------------


def test_normalize_matches_float64_and_keeps_float32():
    image = ramp(256, 30)
    got = data.normalize(image)
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = (np.asarray(image, np.float64) / 255 - mean) / deviation
    assert got.dtype == np.float32
    # Values up to 2.7, three roundings of float32 (6e-8 each), one division by 0.22.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_to_uint8_gives_back_all_256_levels():
    levels = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    back = data.to_uint8(data.normalize(Image.fromarray(levels)))
    np.testing.assert_array_equal(back, levels)
    assert back.dtype == np.uint8


# --- The stream -----------------------------------------------------------------------

SIZE = 28


@pytest.fixture
def files(tmp_path):
    for i in range(5):
        save_noise(tmp_path / f"{i}.png", width=30 + 3 * i, height=40 - i, seed=i)
    return data.list_images(tmp_path)


def take(stream, batches: int) -> list[data.Batch]:
    taken = list(itertools.islice(stream, batches))
    stream.close()
    return taken


def test_stream_walks_the_list_cyclically(files):
    batches = take(data.stream(files, SIZE, batch_size=3), 4)
    positions = np.concatenate([batch.positions for batch in batches])
    np.testing.assert_array_equal(positions, np.arange(12))
    images = np.concatenate([batch.images for batch in batches])
    assert images.shape == (12, SIZE, SIZE, 3) and images.dtype == np.float32
    for k in positions:
        image = data.read_rgb(files[k % 5])
        expected = data.normalize(data.training_crop(image, SIZE))
        np.testing.assert_array_equal(images[k], expected)
    assert all(batch.valid.all() and batch.errors == [] for batch in batches)


@pytest.mark.parametrize("num_threads", [0, 1, 3, 8])
def test_any_number_of_threads_gives_the_same_sequence(files, monkeypatch, num_threads):
    expected = take(data.stream(files, SIZE, batch_size=2, num_threads=2), 5)
    read = data.read_rgb

    def uneven(path):  # early images come last
        time.sleep(0.02 if Path(path).name in ("0.png", "3.png") else 0.0)
        return read(path)

    monkeypatch.setattr(data, "read_rgb", uneven)
    got = take(data.stream(files, SIZE, batch_size=2, num_threads=num_threads), 5)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.images, other.images)


@pytest.mark.parametrize("start", [1, 5, 7, 10**12 + 3])
def test_a_stream_started_at_k_continues_the_one_that_got_there(files, start):
    (got,) = take(data.stream(files, SIZE, start=start, batch_size=3), 1)
    np.testing.assert_array_equal(got.positions, start + np.arange(3))
    (walk,) = take(data.stream(files, SIZE, start=start % 5, batch_size=3), 1)
    np.testing.assert_array_equal(got.images, walk.images)


def test_one_image_per_batch_equals_many(files):
    singles = take(data.stream(files, SIZE, start=3, batch_size=1), 4)
    (batch,) = take(data.stream(files, SIZE, start=3, batch_size=4), 1)
    np.testing.assert_array_equal(
        np.concatenate([single.images for single in singles]), batch.images
    )


def test_broken_files_keep_their_place_and_are_named(files):
    files[1].write_bytes(files[1].read_bytes()[:300])
    os.remove(files[3])
    (batch,) = take(data.stream(files, SIZE, batch_size=5), 1)
    np.testing.assert_array_equal(batch.valid, [True, False, True, False, True])
    assert not batch.images[[1, 3]].any() and batch.images[[0, 2, 4]].all(0).any()
    assert len(batch.errors) == 2
    assert batch.errors[0].startswith(f"{files[1]}: ")
    assert batch.errors[1] == f"{files[3]}: No such file or directory"


def test_a_bug_in_reading_is_not_taken_for_a_broken_file(files, monkeypatch):
    def buggy(image, size, patch_size):
        raise TypeError("a bug")

    monkeypatch.setattr(data, "training_crop", buggy)
    with pytest.raises(TypeError, match="a bug"):
        take(data.stream(files, SIZE), 1)


def test_closing_the_stream_ends_its_threads(files):
    before = set(threading.enumerate())
    stream = data.stream(files, SIZE, num_threads=3)
    next(stream)
    ours = set(threading.enumerate()) - before
    assert any(thread.name.startswith("grain-prefetch") for thread in ours)
    stream.close()
    for thread in ours:
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=10)
            assert not thread.is_alive(), f"{thread.name} still reads"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": -1}, "start is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_threads": -2}, "num_threads is -2"),
        ({"size": 30}, "size is 30 pixels"),
        ({"files": []}, "training list is empty"),
    ],
)
def test_wrong_arguments_raise_at_the_call(files, options, message):
    arguments = {"files": files, "size": SIZE} | options
    with pytest.raises(ValueError, match=message):
        data.stream(**arguments)
