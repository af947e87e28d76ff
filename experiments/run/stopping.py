"""SIGTERM and Ctrl-C: a run that is told to stop ends between two steps, with a save.

    SIGTERM | SIGINT --> asked --the loop looks after each step--> save, exit code 75
    a second SIGINT --> KeyboardInterrupt: at once, exit code 130

What comes before the first step can be computed again: there, the first signal stops.
"""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was told to stop where nothing has to be saved."""


class Stopping:
    """Catches the signals, as a context manager; the old handlers come back after it.

    Attributes:
      asked: the name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._finishes_step = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def finish_steps(self, yes: bool = True) -> None:
        """From here on a signal waits for the loop to look at `asked`; or not any more.

        Raises:
          Stopped: it does not, and one came in the meantime.
        """
        self._finishes_step = yes
        if self.asked and not yes:
            raise Stopped(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked is not None, signal.Signals(number).name
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if not self._finishes_step:
            raise Stopped(self.asked)
