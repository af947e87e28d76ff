"""Logs every step, one line per image, and decides when the run ends.

    Dispatched step --Journal.read, one step later--> metrics.jsonl, sinks, live line
                                                  --> done | stop | an error

All processes read the same numbers and decide alike; only the first one writes.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.run.heartbeat import Heartbeat
from experiments.run.progress import LiveLine
from experiments.run.sinks import Sinks
from experiments.run.workdir import Workdir
from sinder_jax import repair
from sinder_jax.data.listing import Photograph

PER_IMAGE = ("layer", "loss", "alpha", "num_outliers", "finite")
NAMED = 1000  # at most this many files of a kind are named


@dataclasses.dataclass
class Counts:
    """What a run has seen so far, for its summary; stored with each state."""

    images: int = 0
    images_with_defect: int = 0
    images_not_finite: int = 0
    images_unreadable: int = 0
    files_not_finite: list[str] = dataclasses.field(default_factory=list)
    unreadable_files: list[str] = dataclasses.field(default_factory=list)
    share_of_last_images_without_defect: float = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts one more image by its row of the metrics."""
        self.images += 1
        self.images_with_defect += row["layer"] not in (None, -1)
        self.share_of_last_images_without_defect = row["skipped"]
        if not row["readable"]:
            self.images_unreadable += 1
            _name(row["file"], self.unreadable_files)
        elif not row["finite"]:
            self.images_not_finite += 1
            _name(row["file"], self.files_not_finite)


def _name(file: str, files: list[str]) -> None:
    if file not in files and len(files) < NAMED:
        bisect.insort(files, file)


class Dispatched(NamedTuple):
    """A step that the devices may still be computing.

    Attributes:
      start: position of its first image.
      metrics: of the images of all processes.
      vote: true if any process wants to stop, see `cluster.Vote`.
    """

    start: int
    metrics: repair.Metrics
    vote: Any


class Journal:
    """Logs the steps of a run.

    Args:
      config: the run's config.
      train: the training list.
      workdir: where process 0 writes the metrics.
      live, sinks, heartbeat: where process 0 shows each image, too.
      counts: of the images before; goes on counting.
      done: True for a run that was done before its first step.

    Attributes:
      counts: of all images that were read.
      done: True once the stopping rule held.
      stop: True once a process was told to stop.
    """

    def __init__(
        self,
        config: ConfigDict,
        train: Sequence[Photograph],
        workdir: Workdir,
        live: LiveLine,
        sinks: Sinks,
        heartbeat: Heartbeat,
        counts: Counts,
        done: bool,
    ):
        self._config, self._train, self._workdir = config, train, workdir
        self._live, self._sinks, self._heartbeat = live, sinks, heartbeat
        self._unreadable_in_row = 0
        self.counts, self.done, self.stop = counts, done, False

    def read(self, step: Dispatched) -> None:
        """Waits for a step and logs its images; sets `done` and `stop`.

        Raises:
          ValueError: no image of the whole training list can be read.
          FloatingPointError: too many images in a row were not finite.
          OSError: the metrics, or an earlier state, cannot be written.
        """
        values = {name: np.ravel(x) for name, x in step.metrics._asdict().items()}
        # Leaves out images past the end of the run.
        end = min(step.start + len(values["layer"]), int(values["num_images"][0]))
        rows = [self._row(i, step.start + i, values) for i in range(end - step.start)]
        for row in rows:
            self.counts.add(row)
        if self._workdir.writes:
            self._workdir.append_metrics(rows)
            for row in rows:
                if row["readable"] and not row["finite"]:
                    self._live.print(f"skipped, not finite: {row['file']}")
                self._heartbeat.images(row["image"] + 1)
                self._live.update(row["image"] + 1, row)
                self._sinks.write(row)
        self.done |= bool(values["done"][0])
        self.stop |= bool(step.vote)
        self._check(rows, int(values["bad_in_row"][0]))

    def _row(self, i: int, position: int, values: dict[str, Any]) -> dict[str, Any]:
        """The metrics of a step's i-th image; None where JSON has no number."""
        readable = bool(values["counted"][i])
        numbers = {name: values[name][i].item() for name in PER_IMAGE}
        return {
            "image": position,
            "file": self._train[position % len(self._train)].name,
            "readable": readable,
            **{
                name: value if readable and math.isfinite(value) else None
                for name, value in numbers.items()
            },
            "skipped": float(values["skipped"][0]),
        }

    def _check(self, rows: list[dict[str, Any]], bad_in_row: int) -> None:
        for row in rows:
            unreadable = self._unreadable_in_row + 1
            self._unreadable_in_row = 0 if row["readable"] else unreadable
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
