"""A run's progress: a live line on a terminal, a line at intervals elsewhere."""

import time
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.live import Live
from rich.text import Text

from sinder_jax import cli

WINDOW = 50  # the rate is measured over this many images


class LiveLine:
    """Shows how far a repair is; use as a context manager.

    Args:
      config: `max_iter`, `history` and `log_every`, in images.
      start: images passed before.
      shown: False for the processes that show only their messages.
    """

    def __init__(self, config: ConfigDict, *, start: int, shown: bool = True):
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._config, self._shown, self._logged = config, shown, start
        self._times = [(start, time.monotonic())]

    def __enter__(self) -> "LiveLine":
        """Starts the live line."""
        if self._shown and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Removes the live line."""
        self._live.stop()

    def update(self, num_images: int, row: dict[str, Any]) -> None:
        """Shows the newest image; `row` is its line of the metrics."""
        if not self._shown:
            return
        self._times = [*self._times[-WINDOW:], (num_images, time.monotonic())]
        line = self._line(num_images, row)
        if self._console.is_terminal:
            self._live.update(Text(line))
        every = self._config.log_every
        if num_images // every > self._logged // every:
            self._logged = num_images
            self.print(line)

    def print(self, text: str) -> None:
        """Prints a line that stays, above the live one."""
        self._console.print(cli.shown(text), markup=False, soft_wrap=True)

    def _line(self, num_images: int, row: dict[str, Any]) -> str:
        (first, begin), (last, end) = self._times[0], self._times[-1]
        rate = (last - first) / max(end - begin, 1e-9)
        total = self._config.max_iter
        left = duration((total - num_images) / max(rate, 1e-9))
        defect = "no defect"
        if row["layer"] is not None and row["layer"] >= 0:
            loss = "nan" if row["loss"] is None else f"{row['loss']:.3f}"
            outliers = row["num_outliers"]
            defect = f"block {row['layer']}  loss {loss}  outliers {outliers}"
        return (
            f"image {num_images}/{total}  {defect}  "
            f"skipped {row['skipped']:.0%} of {self._config.history}  "
            f"{rate:.2f} img/s  at most {left} left"
        )


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds: the two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
