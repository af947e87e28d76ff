"""Logs every step, one line per image, and decides when the run ends.

    Dispatched step --Journal.read, one step later--> metrics.jsonl, sinks, live line
                                                  --> done | stop | an error

All processes read the same numbers and decide alike; only the first one writes.
"""

import math
from collections.abc import Sequence
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
      done: True for a run that was done before its first step.

    Attributes:
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
        done: bool,
    ):
        self._config, self._train, self._workdir = config, train, workdir
        self._live, self._sinks, self._heartbeat = live, sinks, heartbeat
        self._unreadable_in_row = 0
        self.done, self.stop = done, False

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
