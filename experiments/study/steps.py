"""The steps of an analysis one after the other, and how far they are.

steps --compute--> those that are not kept are computed, and told of by Steps
"""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from experiments.study.cache import Step
from experiments.study.study import Study


def compute(study: Study, steps: Sequence[Step], shown: "Steps") -> None:
    """Computes the steps that are not kept, and tells of each."""
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
    """Shows what is computed: a live line on a terminal, plain lines elsewhere."""

    def __init__(self):
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._status = Status("starting", console=self._console)
        self._label, self._began, self._told = "", 0.0, 0.0
        self.computed = self.reused = 0

    def __enter__(self) -> "Steps":
        """Starts the live line."""
        if self._live:
            self._status.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Takes the live line away."""
        self._status.stop()

    def begin(self, label: str) -> None:
        """A step begins."""
        self._label, self._began = label, time.monotonic()
        self._told = self._began
        self.show(label)

    def inside(self, done: int, total: int) -> None:
        """How far the step is; a plain line every ten seconds."""
        now = time.monotonic()
        if self._live or now - self._told > 10:
            self._told = now
            self.show(f"{self._label}: {done} of {total}")

    def end(self) -> None:
        """The step is done."""
        self.computed += 1
        if self._live:
            seconds = time.monotonic() - self._began
            self._print(f"{self._label}  {seconds:.1f} s")

    def show(self, text: str) -> None:
        """What is being done now."""
        if self._live:
            self._status.update(escape(text))
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
