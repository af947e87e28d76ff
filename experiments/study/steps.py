"""Runs the steps of an analysis one after another, and shows how far they are.

steps --compute--> computes those that the cache does not keep; `Steps` shows each
"""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from experiments.study.cache import Step
from experiments.study.numbers import Study


def compute(study: Study, steps: Sequence[Step], shown: "Steps") -> None:
    """Computes the steps that the cache does not keep, and shows each."""
    missing = []
    for step in {study.cache.path(step): step for step in steps}.values():
        if study.cache.has(step):
            shown.reused += 1
        else:
            missing.append(step)
    for number, step in enumerate(missing, start=1):
        shown.begin(f"[{number}/{len(missing)}] {step.label}")
        study.cache(step)
        shown.end()


class Steps:
    """Shows the current step: a live line on a terminal, plain lines elsewhere."""

    def __init__(self):
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._status = Status("starting", console=self._console)
        self._label, self._began, self._shown = "", 0.0, 0.0
        self.computed = self.reused = 0

    def __enter__(self) -> "Steps":
        """Starts the live line."""
        if self._live:
            self._status.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Removes the live line."""
        self._status.stop()

    def begin(self, label: str) -> None:
        """Starts the clock of a step."""
        self._label, self._began = label, time.monotonic()
        self._shown = self._began
        self.show(label)

    def inside(self, done: int, total: int) -> None:
        """Shows progress within the step; as plain lines, one every ten seconds."""
        now = time.monotonic()
        if self._live or now - self._shown > 10:
            self._shown = now
            self.show(f"{self._label}: {done} of {total}")

    def end(self) -> None:
        """Counts the step, and leaves a line with its time on a terminal."""
        self.computed += 1
        if self._live:
            seconds = time.monotonic() - self._began
            self._print(f"{self._label}  {seconds:.1f} s")

    def show(self, text: str) -> None:
        """Shows a line of text."""
        if self._live:
            self._status.update(escape(text))
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
