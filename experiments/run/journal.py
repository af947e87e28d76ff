"""What is told of each step: a line an image, and when to give up.

    Step dispatched --Journal.read, a step later--> metrics.jsonl, sinks, progress
                                                --> done | stop | an error

All processes read the same numbers and decide alike; only the first one writes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.run.heartbeat import Heartbeat
from experiments.run.progress import Progress
from experiments.run.sinks import Sinks
from experiments.run.workdir import Workdir
from sinder_jax import repair
from sinder_jax.data.listing import Photograph

PER_IMAGE = ("layer", "loss", "alpha", "num_outliers", "finite")


class Dispatched(NamedTuple):
    """A step that the devices may still be computing.

    Attributes:
      start: position of its first image.
      metrics: of the images of all processes.
      vote: whether a process wants to stop, see `cluster.Vote`.
    """

    start: int
    metrics: repair.Metrics
    vote: Any


class Journal:
    """Tells of the steps of a run.

    Args:
      config: of the run.
      train: the training list.
      workdir: gets the metrics, where this process writes.
      progress, sinks, heartbeat: are told as well.
    """

    def __init__(
        self,
        config: ConfigDict,
        train: Sequence[Photograph],
        workdir: Workdir,
        progress: Progress,
        sinks: Sinks,
        heartbeat: Heartbeat,
    ):
        self._config, self._train, self._workdir = config, train, workdir
        self._progress, self._sinks, self._heartbeat = progress, sinks, heartbeat
        self._unreadable_in_row = 0
        self.done = False
        self.stop = False

    def read(self, step: Dispatched) -> None:
        """Waits for a step and tells of it; sets `done` and `stop`.

        Raises:
          ValueError: no image of the whole training list can be read.
          FloatingPointError: too many images in a row were not finite.
          OSError: the metrics, or a state before, cannot be written.
        """
        values = {name: np.ravel(x) for name, x in step.metrics._asdict().items()}
        rows = self._rows(step.start, values)
        if self._workdir.writes:
            self._workdir.append_metrics(rows)
            for row in rows:
                self._tell(row)
        self.done |= bool(values["done"][0])
        self.stop |= bool(step.vote)
        self._check(rows, int(values["bad_in_row"][0]))

    def _rows(self, start: int, values: dict[str, Any]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        # Images past the end of the run are left out; of the others those were counted
        # that could be read.
        end = min(start + len(values["layer"]), int(values["num_images"][0]))
        for i, position in enumerate(range(start, end)):
            counted = bool(values["counted"][i])
            row: dict[str, Any] = {
                "image": position,
                "file": self._train[position % len(self._train)].name,
                "readable": counted,
            }
            for name in PER_IMAGE:
                value = values[name][i].item()
                finite = counted and math.isfinite(value)
                row[name] = value if finite else None
            rows.append(row | {"skipped": float(values["skipped"][0])})
        return rows

    def _tell(self, row: dict[str, Any]) -> None:
        if row["readable"] and not row["finite"]:
            self._progress.print(f"skipped, not finite: {row['file']}")
        self._heartbeat.images(row["image"] + 1)
        self._progress.update(row["image"] + 1, row)
        self._sinks.write(row)

    def _check(self, rows: list[dict[str, Any]], bad_in_row: int) -> None:
        for row in rows:
            self._unreadable_in_row = (
                0 if row["readable"] else self._unreadable_in_row + 1
            )
        if self._unreadable_in_row >= len(self._train):
            raise ValueError(
                f"none of the {len(self._train)} images of {self._config.data} "
                "can be read"
            )
        if bad_in_row >= self._config.max_bad_steps:
            raise FloatingPointError(
                f"{bad_in_row} images in a row gave tokens, loss or gradient that are "
                f"not finite, the last {rows[-1]['file']}: the weights may be damaged, "
                f"or lr is too large (config.lr={self._config.lr}, "
                "config.max_bad_steps)"
            )
