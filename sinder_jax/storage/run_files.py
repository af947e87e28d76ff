"""The files of a repair, by name, and how they are read: the one parser of a workdir.

    WORKDIR/config.json            the config of the first start
    WORKDIR/photographs.json       the training list; size and time of each file
    WORKDIR/diagnosis.json         whether there is a defect, see `run.diagnosis`
    WORKDIR/frozen/                original model, factors, directions (`original`)
    WORKDIR/states/00000120/       ε, momentum, history after 120 images (`snapshots`)
    WORKDIR/metrics.jsonl          one JSON object per line and image, in order
    WORKDIR/claims/00000007        the run that owns the workdir, see `run.claim`
    WORKDIR/alive.json             process, phase and time of the last sign of life
    WORKDIR/pictures/, before_after.png
    WORKDIR/repaired/, repaired.*  the repaired model, as a checkpoint and for PyTorch
    WORKDIR/summary.json           written last

Functions that read take the workdir or one of its files as a `storage.paths` path, of a
disk or of a bucket. Nothing here imports JAX: a status must be cheap at any time.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sinder_jax.storage import paths
from sinder_jax.storage.errors import reason_of
from sinder_jax.storage.paths import AnyPath, StrPath

CONFIG, ALIVE, SUMMARY = "config.json", "alive.json", "summary.json"
METRICS, PHOTOGRAPHS = "metrics.jsonl", "photographs.json"
DIAGNOSIS = "diagnosis.json"
FROZEN, STATES, REPAIRED = "frozen", "states", "repaired"
CLAIMS = "claims"
COMMITTED = "commit_success.txt"  # what Orbax writes last into a directory of a bucket
NAMED = 10  # at most this many ranges of images are named
REPAIR = "a repair"  # what a folder may hold
KEYS = {CONFIG: "mask_thr", SUMMARY: "finished"}  # one that every repair writes


def _integer(least: int, most: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


# A line of metrics.jsonl; null for what an image does not have, or is not finite.
ROW: Mapping[str, Callable[[Any], bool]] = {
    "image": _integer(0),
    "file": _is_a(str),
    "readable": _is_a(bool),
    "layer": _or_null(_integer(-1, 1000)),  # a block; -1 without a defect
    "loss": _or_null(_number),
    "alpha": _or_null(_number),
    "num_outliers": _or_null(_integer(0)),
    "finite": _or_null(_is_a(bool)),
    "skipped": _number,
}


def is_workdir(path: AnyPath) -> bool:
    """True if the directory holds any file of a run, however early it stopped."""
    names = (ALIVE, METRICS, FROZEN, STATES, CONFIG, CLAIMS)
    return any((path / name).exists() for name in names)


def holds(folder: AnyPath, name: str = CONFIG) -> str:
    """Says what a folder holds, by its config.json or summary.json.

    Args:
      folder: need not exist.
      name: `CONFIG` or `SUMMARY`.

    Returns:
      `REPAIR`, "an evaluation (knn)", or "a config.json of something else"; empty
      without such a file. Claims tell a repair whose file is missing or damaged.
    """
    try:
        values = read_json(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return REPAIR if (folder / CLAIMS).exists() else ""
    except ValueError:
        values = {}
    if "protocol" in values:
        return f"an evaluation ({values['protocol']})"
    if KEYS[name] in values or (not values and (folder / CLAIMS).exists()):
        return REPAIR
    return f"a {name} of something else"


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads config.json, alive.json, diagnosis.json or summary.json.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not hold a JSON object; one line.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:  # also bytes that are not text
        raise ValueError(f"{path} is damaged ({reason_of(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (a {type(value).__name__}, not an object)")
    return value


Photographs = Sequence[tuple[str, tuple[int, int] | None]]


def photographs_text(photographs: Photographs) -> str:
    """Content of photographs.json: name, bytes and time in ns, each or null."""
    lines = (
        json.dumps([name, *(stamp or (None, None))]) for name, stamp in photographs
    )
    return '{"photographs": [\n' + ",\n".join(lines) + "\n]}\n"


def read_photographs(path: AnyPath) -> Photographs:
    """The inverse of `photographs_text`.

    Raises:
      ValueError: the file is damaged; one line.
    """
    try:
        return [
            (str(name), None if size is None else (size, changed))
            for name, size, changed in json.loads(path.read_text())["photographs"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({reason_of(error)}): remove it to resume without a "
            "comparison of the photographs"
        ) from None


def read_metrics_lines(workdir: AnyPath) -> dict[int, str]:
    """Lines of metrics.jsonl by image, each with its line end, in order of the images.

    Leaves out what is no row of an image, such as a line that was cut short, and all
    but the first row of an image. Empty if there is no such file.
    """
    try:
        content = (workdir / METRICS).read_bytes()
    except FileNotFoundError:
        return {}
    lines: dict[int, str] = {}
    for line in content.split(b"\n")[:-1]:
        if row := _row(line):
            lines.setdefault(row["image"], line.decode() + "\n")
    return dict(sorted(lines.items()))


def read_metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """One dict per image, in order, from `read_metrics_lines`."""
    return [json.loads(line) for line in read_metrics_lines(workdir).values()]


def lacking(found: Iterable[int], images: int) -> str:
    """Which of the first `images` images have no line in metrics.jsonl.

    Args:
      found: the images that have one.
      images: images passed.

    Returns:
      Such as "metrics.jsonl lacks 3 of 12 images: 4, 7-8"; empty if none is lacking.
    """
    absent = sorted(set(range(images)).difference(found))
    if not absent:
        return ""
    # Numbers of one range keep the same distance to their places in the list.
    by_distance = itertools.groupby(enumerate(absent), lambda pair: pair[1] - pair[0])
    ranges = [[image for _, image in group] for _, group in by_distance]
    named = ", ".join(
        f"{each[0]}-{each[-1]}" if each[1:] else f"{each[0]}" for each in ranges[:NAMED]
    )
    more = ", ..." if ranges[NAMED:] else ""
    return f"{METRICS} lacks {len(absent)} of {images} images: {named}{more}"


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as the row of an image; None if it is not exactly that."""
    try:
        row = json.loads(line.decode())  # of bytes, json takes other encodings, too
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not ROW.keys() <= row.keys():
        return None
    return row if all(fits(row[key]) for key, fits in ROW.items()) else None


def numbered(folder: StrPath) -> list[AnyPath]:
    """The complete directories of a folder that are named by a number, in its order.

    On a disk, an incomplete one has another name. In a bucket it lacks the object that
    Orbax writes last. Empty if there is no such folder.
    """
    folder = paths.as_path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    complete = (
        path
        for path in found
        if re.fullmatch("[0-9]+", path.name)
        and (not paths.is_remote(path) or (path / COMMITTED).exists())
    )
    return sorted(complete, key=lambda path: int(path.name))
