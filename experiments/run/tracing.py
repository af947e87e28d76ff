"""`--profile=START:STOP`: a trace of the devices between two numbers of images.

    "100:120" --parse--> Span --Tracer.at(images)--> workdir/profile/

TensorBoard (with its profile plugin) and xprof show the trace. Not called `profile`:
Python has a module of that name.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.run.claim import LostError
from sinder_jax import cli
from sinder_jax.storage import files, paths
from sinder_jax.storage.paths import StrPath


class Span(NamedTuple):
    """Images passed at which a trace starts and stops."""

    start: int
    stop: int


def parse(text: str) -> Span:
    """Parses `START:STOP`.

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

    A trace that fails only warns: it does not end the run.

    Args:
      span: from `parse`; None for no trace.
      workdir: gets the trace in its folder `profile`; may be in a bucket.
    """

    def __init__(self, span: Span | None, workdir: StrPath):
        self._span, self._target = span, paths.as_path(workdir) / "profile"
        self._folder: Path | None = None  # of the trace being written

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Stops a trace that is still on, unless the run has lost its workdir."""
        if isinstance(error, LostError):
            return
        if self._folder is not None:
            self._stop()
        elif self._span is not None:
            start, stop = self._span
            cli.warn(f"--profile: no step began from {start} to {stop} images")

    def at(self, position: int, pending: Any = None) -> None:
        """Starts or stops the trace where it is due; call before every step.

        Both write to the workdir: call `Workdir.check` before.

        Args:
          position: images passed so far.
          pending: arrays that the devices are still computing. The trace waits for
            them before it starts or stops, so that it holds whole steps.
        """
        if self._span is None:
            return
        start, stop = self._span
        if self._folder is not None and position >= stop:
            jax.block_until_ready(pending)
            self._stop()
        elif self._folder is None and start <= position < stop:
            jax.block_until_ready(pending)
            remote = paths.is_remote(self._target)
            folder = Path(tempfile.mkdtemp() if remote else self._target)
            try:
                jax.profiler.start_trace(folder)
                self._folder = folder
            except Exception as error:  # the profiler raises many kinds
                self._span = None
                cli.warn(f"--profile: no trace: {error}")

    def _stop(self) -> None:
        folder, self._folder, self._span = self._folder, None, None
        assert folder is not None, "a trace that was not started cannot stop"
        try:
            jax.profiler.stop_trace()
            if paths.is_remote(self._target):  # the profiler writes local files only
                files.upload(folder, self._target)
                shutil.rmtree(folder)
        except Exception as error:
            cli.warn(f"--profile: the trace is lost: {error}")
