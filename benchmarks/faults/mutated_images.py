"""Mutated photographs in every format that is decoded, for `mutations`.

    a photograph, encoded --mutate--> FILE --visualize--> picture, or refused

Hardly a format has a checksum. So a picture of other pixels counts as "as stored" if
Pillow by itself decodes the file without an error.
"""

import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults import mutated_bytes
from benchmarks.faults.mutated_weights import CONFIG
from benchmarks.faults.trial import Trial
from experiments import visualize
from sinder_jax import checkpoint, param_tree
from sinder_jax.data import decode

WIDTH, HEIGHT = 322, 245  # whose bytes are found in a header
Random = np.random.Generator
EXTREMES = (0, 1, 2, 4000, 13_000, 30_000, 2**16 - 1, 2**31 - 1, 2**32 - 1)


def encoded(rng: Random) -> dict[str, bytes]:
    """One photograph in many ways, by name."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] / 2.0
    smooth = np.stack([rows, columns, rows + columns], axis=-1)
    photo = Image.fromarray(np.uint8(smooth + rng.integers(0, 8, smooth.shape)))
    exif = Image.Exif()
    exif[0x0112] = 6
    second = {"save_all": True, "append_images": [photo.rotate(180)]}
    ways: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.jpg": (photo, {}),
        "progressive.jpg": (photo, {"progressive": True}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "exif.jpg": (photo, {"exif": exif}),
        "bad_exif.jpg": (photo, {"exif": b"Exif\0\0II*\0" + rng.bytes(300)}),
        "bad_icc.jpg": (photo, {"icc_profile": rng.bytes(3000)}),
        "plain.png": (photo, {}),
        "bad_icc.png": (photo, {"icc_profile": rng.bytes(300), "exif": exif}),
        "palette.png": (photo.quantize(64), {"transparency": 3}),
        "alpha.png": (photo.convert("RGBA"), {}),
        "deep.png": (Image.fromarray(np.uint16(smooth[..., 0] * 99)), {}),
        "plain.webp": (photo, {}),
        "lossless.webp": (photo.convert("RGBA"), {"lossless": True}),
        "animated.webp": (photo, second),
        "animated.gif": (photo, second),
        "plain.tif": (photo, {}),
        "lzw.tif": (photo, {"compression": "tiff_lzw", **second}),
        "zip.tif": (photo, {"compression": "tiff_deflate", "exif": exif}),
        "jpeg.tif": (photo, {"compression": "jpeg"}),
        "plain.bmp": (photo, {}),
        "plain.ppm": (photo, {}),
    }
    if "AVIF" in decode.FORMATS:
        ways["plain.avif"] = (photo, {})
    files = {}
    for name, (image, options) in ways.items():
        file = io.BytesIO()
        image.save(file, Image.registered_extensions()[Path(name).suffix], **options)
        files[name] = file.getvalue()
    return files


def sizes(rng: Random, data: bytes) -> bytes:
    """Another width, height or both wherever a header may hold them."""
    changed = data[:2000]
    for side in (WIDTH, HEIGHT):
        for kind in ("<H", ">H", "<I", ">I"):
            wrong = EXTREMES[rng.integers(len(EXTREMES))] & (
                2 ** (16 if "H" in kind else 32) - 1
            )
            if rng.integers(3):
                changed = changed.replace(
                    struct.pack(kind, side), struct.pack(kind, wrong)
                )
    return with_checksums(changed + data[2000:])


def field(rng: Random, data: bytes) -> bytes:
    """An extreme number in a header, such as the length of a chunk."""
    place = int(rng.integers(min(len(data), 400)))
    wrong = struct.pack(["<I", ">I"][rng.integers(2)], EXTREMES[rng.integers(9)])
    wrong = wrong[: int(rng.choice([2, 4]))]
    return with_checksums(data[:place] + wrong + data[place + len(wrong) :])


def nested(rng: Random, data: bytes) -> bytes:
    """A photograph in a photograph, or among other things."""
    wrapped = [data[: len(data) // 2] + data + data[len(data) // 2 :], b"\0" * 9 + data]
    wrapped += [b"<svg>" + data + b"</svg>", b"%PDF-1.4\n" + data, b"GIF89a" + data]
    return wrapped[rng.integers(len(wrapped))]


def bomb(rng: Random, data: bytes) -> bytes:
    """Very many equal pixels in few bytes."""
    file = io.BytesIO()
    side, kind = (
        int(rng.choice([3000, 6000])),
        ("PNG", "WEBP", "GIF", "TIFF", "JPEG")[rng.integers(5)],
    )
    options = {"compression": "tiff_deflate"} if kind == "TIFF" else {"lossless": True}
    Image.new("RGB", (side, side)).save(file, kind, **options)
    return file.getvalue()


def with_checksums(data: bytes) -> bytes:
    """A PNG whose checksums fit again, so that its chunks are looked into."""
    if not data.startswith(b"\x89PNG"):
        return data
    changed, place = bytearray(data), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        if end + 4 > len(data):
            break
        changed[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(changed)


MUTATIONS = [*mutated_bytes.ANY, sizes, sizes, sizes, field, field, nested, bomb]


def trials(folder: Path, rng: Random) -> Iterator[Trial]:
    """Trials of photographs, each with one mutation of one of `encoded`."""
    params = {
        path: rng.standard_normal(shape, np.float32)
        for path, shape in param_tree.leaf_shapes(CONFIG).items()
    }
    checkpoint.save(folder / "model", CONFIG, param_tree.unflatten(params))
    options = [f"--checkpoint={folder / 'model'}", "--short-side=28"]
    originals = encoded(rng)

    @functools.cache
    def wanted(name: str) -> bytes:
        (folder / name).write_bytes(originals[name])
        arguments = [str(folder / name), *options, f"--out={folder / 'want'}"]
        with contextlib.redirect_stdout(io.StringIO()):
            visualize.main([*arguments, "--overwrite"])
        return (folder / "want" / f"{Path(name).stem}.png").read_bytes()

    first, *_ = originals
    wanted(first)
    yield Trial(
        "unchanged",
        [str(folder / first), *options, "--out=OUT"],
        folder / first,
        lambda out: "right",
    )
    while True:
        name = str(rng.choice(list(originals)))
        mutate = MUTATIONS[rng.integers(len(MUTATIONS))]
        path = folder / f"mutated{Path(name).suffix}"
        path.write_bytes(mutate(rng, originals[name]))

        def judge(out: Path, name: str = name, path: Path = path) -> str:
            if (out / "mutated.png").read_bytes() == wanted(name):
                return "right"
            try:
                with Image.open(path) as image:
                    image.load()
            except Exception:
                return "wrong"
            return "as stored"

        what = f"{name}: {mutate.__name__}"
        yield Trial(what, [str(path), *options, "--out=OUT"], path, judge)
