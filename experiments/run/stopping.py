"""SIGTERM and Ctrl-C: a run that is told to stop saves its state between two steps.

    SIGTERM | SIGINT --> asked --the loop looks after each step--> save, exit code 75
    a second SIGINT --> KeyboardInterrupt: at once, exit code 130

All work before the first step can be repeated: there, the first signal stops the run.
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The run was told to stop where nothing has to be saved.

    Like KeyboardInterrupt, no library takes it for an error of its own.
    """


class Stopping:
    """Catches the signals; use as a context manager, which restores the old handlers.

    A `Stopped` raised in the block ends the block with a line on stderr.

    Attributes:
      asked: name of the last signal, None before the first one.
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

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped):
            print(
                f"stopped by {error}: run the same command to resume", file=sys.stderr
            )
        return isinstance(error, Stopped)

    def finish_steps(self, yes: bool = True) -> None:
        """From now on a signal only sets `asked`, for the loop to see; or stops again.

        Raises:
          Stopped: `yes` is False and a signal has come in the meantime.
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
