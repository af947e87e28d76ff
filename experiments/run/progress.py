"""A run's progress: a live line on a terminal, a line at intervals elsewhere."""

import time
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.live import Live
from rich.text import Text

WINDOW = 50  # images that the rate is measured over


class Progress:
    """Shows where a repair stands; use as a context manager.

    Args:
      config: says `max_iter`, `history` and `log_every`, in images.
      start: images passed before.
      shown: False for the processes that leave it to another one.
    """

    def __init__(self, config: ConfigDict, *, start: int, shown: bool = True):
        self._console = Console(highlight=False)
        self._shown = shown
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._total, self._history = config.max_iter, config.history
        self._every = config.log_every
        self._times = [(start, time.monotonic())]
        self._logged = start

    def __enter__(self) -> "Progress":
        """Starts the live line."""
        if self._shown and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Takes the live line away."""
        self._live.stop()

    def update(self, num_images: int, row: dict[str, Any]) -> None:
        """Shows the newest image; `row` is its line of the metrics."""
        if not self._shown:
            return
        self._times = [*self._times[-WINDOW:], (num_images, time.monotonic())]
        line = self._line(num_images, row)
        if self._console.is_terminal:
            self._live.update(Text(line))
        if num_images // self._every > self._logged // self._every:
            self._logged = num_images
            self.print(line)

    def print(self, text: str) -> None:
        """A line that stays, by any process."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _line(self, num_images: int, row: dict[str, Any]) -> str:
        (first, begin), (last, end) = self._times[0], self._times[-1]
        rate = (last - first) / max(end - begin, 1e-9)
        left = (self._total - num_images) / max(rate, 1e-9)
        defect = "no defect"
        if row["layer"] is not None and row["layer"] >= 0:
            loss = "nan" if row["loss"] is None else f"{row['loss']:.3f}"
            defect = (
                f"block {row['layer']}  loss {loss}  outliers {row['num_outliers']}"
            )
        return (
            f"image {num_images}/{self._total}  {defect}  "
            f"skipped {row['skipped']:.0%} of {self._history}  "
            f"{rate:.2f} img/s  at most {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as short as they can be."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
