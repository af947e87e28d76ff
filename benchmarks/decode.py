"""Images per second from JPEG files to batches, by threads and by processes.

    python -m benchmarks.decode [--seconds=10] [--size=518] [--folder=/data/train]

Without --folder, the photographs inside scikit-image are cropped to 500 x 375 pixels,
about ImageNet's mean size, and saved as JPEGs of quality 95. `one after the other` uses
one core; the other rates are those of `batches.stream` with threads, or with worker
processes of one thread each, after a warm-up.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sinder_jax import families
from sinder_jax.data import batches, decode, listing

WIDTH, HEIGHT = 500, 375  # pixels
BATCH = 4  # images
FAMILY = families.named(families.DEFAULT)


def write_photographs(folder: Path) -> None:
    """Writes the middle of each sample photograph as a JPEG of ImageNet's size."""
    for file in listing.sample_images():
        image = decode.read_rgb(file)
        scale = max(WIDTH / image.width, HEIGHT / image.height)
        sides = (round(image.width * scale), round(image.height * scale))
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = (sides[0] - WIDTH) // 2, (sides[1] - HEIGHT) // 2
        image = image.crop((left, top, left + WIDTH, top + HEIGHT))
        image.save(folder / f"{file.stem}.jpg", quality=95)


def rate(call: Callable[[], Any], seconds: float) -> float:
    """Calls per second, measured for at least `seconds`."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def stream_rate(
    photographs: Sequence[listing.Photograph], size: int, seconds: float, **options: int
) -> float:
    """Images per second of a stream, without its first batches."""
    stream = batches.stream(
        photographs,
        size,
        patch_size=FAMILY.patch_size,
        statistics=FAMILY.statistics,
        batch_size=BATCH,
        **options,
    )
    for _ in range(
        4 + 2 * options.get("num_workers", 0)
    ):  # read ahead while the workers start
        next(stream)
    images = rate(lambda: next(stream), seconds) * BATCH
    stream.close()
    return images


def rates(folder: Path, size: int, seconds: float) -> dict[str, Any]:
    """Images per second from a folder, for each way of reading."""
    photographs = listing.open_photographs(str(folder))
    several = sorted({1, 2, os.cpu_count() or 1})

    def crop(photograph: listing.Photograph) -> Image.Image:
        image = photograph.read()
        return decode.training_crop(image, size, patch_size=FAMILY.patch_size)

    def normalize(image: Image.Image) -> None:
        decode.normalize(image, FAMILY.statistics)

    walk = itertools.cycle(photographs)
    crops = itertools.cycle([crop(x) for x in photographs])
    return {
        "images/s": {
            "one after the other": rate(
                lambda: normalize(crop(next(walk))),
                seconds,
            ),
            "decoding alone": rate(lambda: next(walk).read(), seconds),
            "normalizing alone": rate(lambda: normalize(next(crops)), seconds),
            **{
                f"{n} threads": stream_rate(photographs, size, seconds, num_threads=n)
                for n in several
            },
            **{
                f"{n} workers": stream_rate(
                    photographs, size, seconds, num_threads=1, num_workers=n
                )
                for n in several
            },
        }
    }


def bench_decode(rounds: int, quick: bool) -> dict[str, Any]:
    """Measures JPEGs of ImageNet's size, each rate for two seconds per round."""
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        return rates(Path(folder), 518, 0.5 if quick else 2.0 * rounds)


def main() -> None:
    """Prints the rates as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="duration of each measurement"
    )
    parser.add_argument("--size", type=int, default=518, help="pixels")
    parser.add_argument("--folder", type=Path, help="your photographs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.folder is None:
            write_photographs(Path(folder))
        found = rates(args.folder or Path(folder), args.size, args.seconds)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
