"""Random values of every key of a repair's config, for `mutations`.

key, value --`--config.KEY=VALUE` of a tiny run--> finished, or refused
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.trial import Trial
from experiments import config as config_files
from sinder_jax.storage import run_files

# Two images of one photograph, on 16 patches.
TINY = {"image_size": 56, "max_iter": 2, "history": 2, "measure_images": 1}
NUMBERS = [
    *("nan", "inf", "-inf", "1e400", "1e300", "-1e300", "1e-400", "1e-300", "-0.0"),
    *("-1", "0", "1", "2", "3", "5", "7", "0.5", "0.001", "1e3", "0x10", "1_0", "14"),
    *(str(2**31 - 1), str(2**31), str(2**63), str(10**30), str(-(10**30)), "9" * 5000),
]
OTHERS = [
    *("", " ", "None", "true", "False", "yes", "1+1j", "[1, 2]", "{'a': 1}", "'1'"),
    *("é😀", "\udce9", "a\0b", "a\nb", "x" * 100_000, "/", "..", "~", "gs://", "%s{}"),
    *("list:", "folder:nowhere", "tfds:nothing", "list:/dev/zero", "keep", "planted"),
    *("monte_carlo", "mean", "high", "default"),
]
# Valid, and takes as long as it says: walks the disk, or runs to the stopping rule.
LONG = {("data", "/"), ("data", ".."), ("data", ""), ("max_iter", str(2**31 - 1))}


def trials(folder: Path, rng: np.random.Generator) -> Iterator[Trial]:
    """Trials, each with one key changed; the first with none."""
    pixels = rng.integers(0, 256, (80, 90, 3), np.uint8)
    (folder / "photos").mkdir()
    Image.fromarray(pixels).save(folder / "photos" / "a.png")
    tiny = [f"--config.{key}={value}" for key, value in TINY.items()]
    start = ["--config=tiny.py", "--workdir=OUT", *tiny]
    start.append(f"--config.data={folder / 'photos'}")
    yield Trial("unchanged", start, None, _finished)
    config = config_files.load("tiny.py")
    keys = sorted(config.keys())
    while True:
        key = str(rng.choice([*keys, *keys, *keys, "lrr", "", "lr.x"]))
        is_text = key not in keys or isinstance(config[key], str | bool)
        fits = is_text != bool(rng.integers(4))
        value = str(rng.choice(np.array(NUMBERS if fits else OTHERS, object)))
        if (key, value) in LONG:
            continue
        changed = [f"--config.{key}={value}"]
        if not rng.integers(8):
            changed = [f"--config.{key}", value]
        yield Trial(" ".join(changed)[:100], [*start, *changed], None, _finished)


def _finished(workdir: Path) -> str:
    summary = json.loads((workdir / run_files.SUMMARY).read_text())
    return "right" if summary["finished"] else "wrong"
