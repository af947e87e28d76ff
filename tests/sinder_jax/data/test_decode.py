"""decode.py: decoding, torchvision's sizes, the seven shapes, normalizing."""

import functools
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from photos import FAMILY, crop, normalize, save_noise
from sinder_jax.data import decode

PATCH = FAMILY.patch_size
keep = functools.partial(decode.training_keep, patch_size=PATCH)
look_at = functools.partial(decode.visual_resize, patch_size=PATCH)

# --- Decoding -------------------------------------------------------------------------


def test_rgb_files_keep_their_pixels(tmp_path):
    pixels = save_noise(tmp_path / "a.png")
    np.testing.assert_array_equal(
        np.asarray(decode.read_rgb(tmp_path / "a.png")), pixels
    )


def test_a_png_called_jpeg_is_read(tmp_path):
    pixels = save_noise(tmp_path / "a.JPEG", format="PNG")  # as n02105855_2933.JPEG
    np.testing.assert_array_equal(
        np.asarray(decode.read_rgb(tmp_path / "a.JPEG")), pixels
    )


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    save_noise(tmp_path / "a.jpg", width=40, height=30, exif=exif)
    assert decode.read_rgb(tmp_path / "a.jpg").size == (40, 30)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_for_people_are_upright(suffix, orientation, tmp_path):
    upright = np.zeros((30, 40, 3), np.uint8)
    upright[:15, :20] = 255  # white in the upper left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
    got = np.asarray(decode.read_rgb(tmp_path / f"a{suffix}", upright=True))
    assert got.shape == (30, 40, 3)
    corners = got[::29, ::39].mean(axis=-1) > 128
    np.testing.assert_array_equal(corners, [[True, False], [False, False]])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_turns_nothing(tmp_path):
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(range(90))
    save_noise(tmp_path / "a.jpg", exif=exif)
    assert decode.read_rgb(tmp_path / "a.jpg", upright=True).size == (40, 30)


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".webp"])
def test_the_first_picture_of_several_is_read(suffix, tmp_path):
    first, *rest = [Image.new("RGB", (40, 30), (k, k, k)) for k in (200, 100, 0)]
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=rest)
    got = np.asarray(decode.read_rgb(tmp_path / f"a{suffix}"), int)
    assert np.abs(got - 200).max() <= 2


def gray_tiff(bits: int, photometric: int) -> bytes:
    """A gray TIFF of 8 x 8 zeros, written out: Pillow writes no 12 bits."""
    data = bytes(8 * bits)
    shorts = {258: bits, 259: 1, 262: photometric, 277: 1}
    longs = {256: 8, 257: 8, 273: 8 + 2 + 12 * 8 + 4, 279: len(data)}
    entries = [(tag, 3, shorts[tag]) for tag in shorts]
    entries += [(tag, 4, longs[tag]) for tag in longs]
    packed = [struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in sorted(entries)]
    head = b"II*\0" + struct.pack("<IH", 8, len(packed))
    return head + b"".join(packed) + bytes(4) + data


def test_gray_of_another_range_is_refused_not_misread():
    assert not np.asarray(decode.read_rgb(gray_tiff(16, 1))).any()
    assert (np.asarray(decode.read_rgb(gray_tiff(8, 0))) == 255).all()
    for bits, photometric, reason in ((12, 1, "12 bits"), (16, 0, "0 for white")):
        with pytest.raises(decode.UnreadableImage, match=reason):
            decode.read_rgb(gray_tiff(bits, photometric))


def test_large_jpegs_are_decoded_at_full_size(tmp_path):
    save_noise(tmp_path / "a.jpg", width=1200, height=900)
    image = decode.read_rgb(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as direct:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(direct))


def test_16_bit_gray_keeps_the_high_byte(tmp_path):
    levels = np.array([[0, 255, 256, 32768, 65279, 65280, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    red = np.asarray(decode.read_rgb(tmp_path / "a.png"))[0, :, 0]
    np.testing.assert_array_equal(red, [0, 0, 1, 128, 254, 255, 255])


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.array([[(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    pixels = np.asarray(decode.read_rgb(tmp_path / "rgba.png"))[0].tolist()
    # 51/255 is a fifth: 0.8 · 255 = 204.
    assert pixels == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]

    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    pixels = np.asarray(decode.read_rgb(tmp_path / "palette.png"))[0].tolist()
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
    pixels = np.asarray(decode.read_rgb(path)).astype(int)
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
    os.mkfifo(folder / "pipe.png")  # opening it would wait for a writer
    Image.new("RGB", (4000, 4000)).save(folder / "flat.webp", lossless=True)
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
        "pipe.png": "a device or pipe",
        "flat.webp": "4000 x 4000 pixels in .* decompression bomb",
    }


def test_every_broken_file_raises_with_its_path_and_reason(tmp_path):
    for name, reason in write_broken(tmp_path).items():
        with pytest.raises(decode.UnreadableImage, match=f"{name}: .*{reason}"):
            decode.read_rgb(tmp_path / name)


def test_bytes_are_read_as_files_are(tmp_path):
    pixels = save_noise(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(np.asarray(decode.read_rgb(content)), pixels)
    with pytest.raises(decode.UnreadableImage, match="^train#7: .*truncated"):
        decode.read_rgb(content[:2000], name="train#7")


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
    crop(Image.new("RGB", (width, height)), 518)
    assert sizes == [(resized, Image.Resampling.BICUBIC)]


@pytest.mark.parametrize(
    "surplus, first",
    # (side - size)/2 rounded half to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4.
    [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (11, 6), (13, 6)],
)
def test_the_crop_starts_at_half_the_surplus_half_to_even(surplus, first):
    # The short side is right already, so nothing is resampled.
    landscape = np.asarray(crop(ramp(28 + surplus, 28), 28))
    assert landscape.shape == (28, 28, 3)
    np.testing.assert_array_equal(landscape[0, :, 0], first + np.arange(28))
    np.testing.assert_array_equal(landscape[:, 0, 1], np.arange(28))
    portrait = np.asarray(crop(ramp(28, 28 + surplus), 28))
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
    got = np.asarray(crop(image, size), np.float64)
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
    image = look_at(Image.new("RGB", (width, height)), short_side)
    assert image.size == expected


def test_visual_resize_trims_right_and_bottom_only(monkeypatch):
    monkeypatch.setattr(decode, "MAX_SIDE", 28)
    pixels = np.asarray(look_at(ramp(40, 28), 28))
    np.testing.assert_array_equal(pixels, np.asarray(ramp(40, 28))[:28, :28])


@pytest.mark.parametrize("side", [0, -14, 13, 500, 519])
def test_sizes_that_are_no_whole_patches_raise_with_sizes_near_them(side):
    image = Image.new("RGB", (50, 50))
    for call in (crop, keep, look_at):
        with pytest.raises(ValueError, match=f"got {side} pixels.* multiple of .*14"):
            call(image, side)
    with pytest.raises(ValueError, match="such as 504 or 518"):
        crop(image, 510)
    for call in (crop, keep, look_at):
        with pytest.raises(ValueError, match="got 14000000 pixels, expected at most"):
            call(image, 14_000_000)


# --- The seven shapes -----------------------------------------------------------------


def test_the_shapes_are_whole_patches_of_known_sizes():
    assert decode.buckets(518, PATCH) == [
        (518, 1036),
        (518, 784),  # 777 is 55.5 patches
        (518, 686),  # 690.67 is 49.3
        (518, 518),
        (686, 518),
        (784, 518),
        (1036, 518),
    ]


@pytest.mark.parametrize(
    "width, height, shape",
    [
        (500, 500, (518, 518)),
        (500, 375, (686, 518)),  # ImageNet's mean
        (375, 500, (518, 686)),
        (6000, 4000, (784, 518)),
        (1920, 1080, (1036, 518)),  # 16:9 is nearer to 2:1 than to 3:2
        (3000, 100, (1036, 518)),  # nothing is longer
        (20, 2000, (518, 1036)),
        (114, 100, (518, 518)),  # 1.140 and 1.151: 1:1 and 686:518 meet at √1.324
        (1160, 1000, (686, 518)),
    ],
)
def test_a_picture_gets_the_shape_of_the_nearest_aspect(width, height, shape):
    image = keep(Image.new("RGB", (width, height)), 518)
    assert image.size == shape


def test_the_nearest_aspect_is_that_of_the_least_ratio():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(20, 2000, (100, 2)):
        kept = keep(Image.new("RGB", (width, height)), 28)
        ratios = [
            math.exp(abs(math.log(w * height / (h * width))))
            for w, h in decode.buckets(28, PATCH)
        ]
        best = decode.buckets(28, PATCH)[int(np.argmin(ratios))]
        assert kept.size == best, (width, height)


@pytest.mark.parametrize("width, height", [(50, 50), (60, 55), (55, 60), (57, 50)])
def test_a_nearly_square_picture_is_kept_as_it_is_cropped(width, height):
    image = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    )
    np.testing.assert_array_equal(
        np.asarray(keep(image, 42)),
        np.asarray(crop(image, 42)),
    )


@pytest.mark.parametrize(
    "width, height",
    [(42, 28), (56, 28), (90, 28), (50, 33), (33, 50), (40, 30), (30, 40), (20, 90)],
)
def test_the_picture_just_covers_its_shape_and_is_cut_around_the_middle(width, height):
    """Red rises to the right and green downwards, linearly, as resampling keeps it."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 2, rows * 2, np.full_like(rows, 200)], axis=-1)
    image = Image.fromarray(pixels.astype(np.uint8))
    kept = np.asarray(keep(image, 28), np.float64)
    assert kept[..., 2].min() == kept[..., 2].max() == 200  # nothing was made up
    scale = max(kept.shape[1] / width, kept.shape[0] / height)  # of the side that fits
    for axis, side, channel in ((1, width, 0), (0, height, 1)):
        got = kept[..., channel].mean(axis=1 - axis)
        centers = (np.arange(len(got)) + 0.5 - len(got) / 2) / scale + side / 2
        inner = slice(3, -3)  # the edges are clamped
        # Levels are 2 a pixel: half a pixel of the crop, and the side rounded down.
        assert np.abs(got - (centers - 0.5) * 2)[inner].max() < 2.5


# --- Normalizing ----------------------------------------------------------------------


def test_normalize_matches_float64_and_keeps_float32():
    image = ramp(256, 30)
    got = normalize(image)
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = (np.asarray(image, np.float64) / 255 - mean) / deviation
    assert got.dtype == np.float32
    # Values up to 2.7, three roundings of float32 (6e-8 each), one division by 0.22.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_normalize_takes_pixels_however_they_lie_in_memory():
    pixels = np.asarray(ramp(40, 30))
    expected = normalize(ramp(40, 30))
    np.testing.assert_array_equal(normalize(pixels), expected)
    np.testing.assert_array_equal(normalize(np.asfortranarray(pixels)), expected)
    np.testing.assert_array_equal(normalize(pixels[:, ::-1]), expected[:, ::-1])


def test_normalizing_keeps_all_256_levels():
    levels = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    mean, std = np.asarray(FAMILY.statistics, np.float32)
    back = np.rint((normalize(Image.fromarray(levels)) * std + mean) * 255)
    np.testing.assert_array_equal(back, levels)


def test_an_evaluation_s_crop_is_that_of_the_spec():
    """Spec knn.md, section 8: 500 x 375 -> 341 x 256 -> 224 at left 58, top 16."""
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    image = Image.fromarray(noise)
    found = decode.evaluation_crop(image, 256, 224)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[16 : 16 + 224, 58 : 58 + 224]
    np.testing.assert_array_equal(np.asarray(found), expected)
