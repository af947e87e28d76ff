"""`--profile=START:STOP`: a trace of the devices between two numbers of images.

    "100:120" --parse--> Span --Tracer.at(images)--> workdir/profile/

TensorBoard (with its profile plugin) and xprof show the trace. Not called `profile`:
Python has a module of that name.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sinder_jax.storage import files, paths
from sinder_jax.storage.paths import StrPath

FOLDER = "profile"


class Span(NamedTuple):
    """Images passed at which a trace starts and stops."""

    start: int
    stop: int


def parse(text: str) -> Span:
    """`START:STOP` as numbers.

    Raises:
      ValueError: they are not two whole numbers from 0 on, the second the larger one.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() for p in parts):
        raise ValueError(
            f"--profile={text} must be START:STOP, two whole numbers of images such as "
            "100:120"
        )
    span = Span(*map(int, parts))
    if span.start >= span.stop:
        raise ValueError(f"--profile={text}: START must be smaller than STOP")
    return span


class Tracer:
    """Traces the span of a run; use as a context manager around the loop.

    A failed trace is a warning and does not end the run.

    Args:
      span: from `parse`; None: no trace.
      workdir: the trace goes into its folder `profile`; may be in a bucket.
    """

    def __init__(self, span: Span | None, workdir: StrPath):
        self._span, self._target = span, paths.as_path(workdir) / FOLDER
        self._remote = paths.is_remote(self._target)
        self._folder: Path | None = None  # of the trace being written

    def __enter__(self) -> "Tracer":
        """Nothing yet: the first image decides."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stops a trace that is still on when the loop ends."""
        if self._folder is not None:
            self._stop()
        elif self._span is not None:
            start, stop = self._span
            self._say(f"no trace: no step began from {start} to {stop} images")

    def at(self, position: int, pending: Any = None) -> None:
        """Starts or stops; call before every step.

        Args:
          position: images passed so far.
          pending: what the devices are still computing; waited for before the trace
            starts or stops, so that it holds whole steps.
        """
        if self._span is None:
            return
        if self._folder is None and self._span.start <= position < self._span.stop:
            jax.block_until_ready(pending)
            self._start()
        elif self._folder is not None and position >= self._span.stop:
            jax.block_until_ready(pending)
            self._stop()

    def _start(self) -> None:
        folder = Path(tempfile.mkdtemp() if self._remote else self._target)
        try:
            jax.profiler.start_trace(folder)
            self._folder = folder
        except Exception as error:  # the profiler raises many kinds
            self._span = None
            self._say(f"no trace: {error}")

    def _stop(self) -> None:
        folder, self._folder, self._span = self._folder, None, None
        assert folder is not None, "a trace that was not started cannot stop"
        try:
            jax.profiler.stop_trace()
            if self._remote:  # the profiler writes local files only
                files.upload(folder, self._target)
                shutil.rmtree(folder)
        except Exception as error:
            self._say(f"the trace is lost: {error}")

    def _say(self, text: str) -> None:
        print(f"warning: --profile: {text}", file=sys.stderr)
