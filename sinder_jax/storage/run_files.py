"""The files of a repair, by name, and how they are read: the one parser of a workdir.

    WORKDIR/config.json            the config of the first start
    WORKDIR/frozen/                original model, factors, directions (`original`)
    WORKDIR/states/00000120/       ε, momentum, history after 120 images (`snapshots`)
    WORKDIR/metrics.jsonl          one JSON object per line and image, in order
    WORKDIR/alive.json             process, phase and time of the last sign of life
    WORKDIR/pictures/, before_after.png
    WORKDIR/repaired/, repaired.*  the repaired model, as a checkpoint and for PyTorch
    WORKDIR/summary.json           written last

Functions that read take the workdir or one of its files as a `storage.paths` path, of a
disk or of a bucket. Nothing here imports JAX: a status must be cheap at any time.
"""

import json
import re
from typing import Any

from sinder_jax.storage import paths
from sinder_jax.storage.errors import reason_of
from sinder_jax.storage.paths import AnyPath, StrPath

CONFIG, ALIVE, SUMMARY = "config.json", "alive.json", "summary.json"
METRICS = "metrics.jsonl"
FROZEN, STATES, REPAIRED = "frozen", "states", "repaired"
COMMITTED = "commit_success.txt"  # what Orbax writes last into a directory of a bucket


def is_workdir(path: AnyPath) -> bool:
    """True if the directory holds any file of a run, however early it stopped."""
    names = (ALIVE, METRICS, FROZEN, STATES, CONFIG)
    return any((path / name).exists() for name in names)


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads config.json, alive.json or summary.json.

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


def read_metrics_lines(workdir: AnyPath) -> list[str]:
    """Complete lines of metrics.jsonl, each with its line end.

    Stops at the first line that is cut short or damaged: no line after it is trusted.
    Empty if there is no such file.
    """
    try:
        content = (workdir / METRICS).read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for line in content.split(b"\n")[:-1]:
        if not _is_row(line):
            break
        lines.append(line.decode() + "\n")
    return lines


def read_metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """One dict per image, in order, from `read_metrics_lines`."""
    return [json.loads(line) for line in read_metrics_lines(workdir)]


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("image"), int)


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
