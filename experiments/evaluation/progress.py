"""How far an evaluation is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Self

from rich import progress
from rich.console import Console

from experiments.run.progress import duration
from sinder_jax import cli

EVERY = 10.0  # seconds between two plain lines


class Progress:
    """Shows one step after another; use as a context manager.

    On a terminal a step has a bar; elsewhere a line at its start and one every ten
    seconds. Everything goes to stderr: results are printed on stdout.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task: progress.TaskID | None = None
        self._label, self._total, self._shown = "", 0, 0.0
        self._first, self._began = 0, 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """Starts a step of `total` items, of which `done` are done already."""
        self.end()
        self._label, self._total, self._first = label, total, done
        self._began = self._shown = time.monotonic()
        self._task = self._bars.add_task(label, total=total, completed=done, note="")
        if not self._console.is_terminal:
            resumed = f", {done} done already" if done else ""
            self.say(f"{label}: {total}{resumed}")

    def at(self, done: int, note: str = "") -> None:
        """Shows that `done` items are done; `note` says more, such as a loss."""
        assert self._task is not None, "begin was called"
        if self._console.is_terminal:
            self._bars.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._shown > EVERY:
            self._shown = now
            rate = (done - self._first) / (now - self._began)
            left = duration((self._total - done) / rate) if rate else "unknown time"
            end = f"  {note}" if note else ""
            self.say(f"{self._label}: {done} of {self._total}, {left} left{end}")

    def end(self) -> None:
        """Removes the bar of the step, if there is one."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = None

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(cli.shown(text), markup=False, soft_wrap=True)
