"""`--profile=START:STOP`: what the devices do between two images, as a trace.

    "100:120" --parse--> Span --Tracer.at(images)--> workdir/profile/

TensorBoard (with its profile plugin) and xprof show the trace. Not called `profile`,
which is a module of Python's own.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

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

    A trace that cannot be made is said once and does not end the run.

    Args:
      span: from `parse`; None: no trace.
      workdir: the trace goes into its folder `profile`; may be remote.
    """

    def __init__(self, span: Span | None, workdir: Any):
        self._span, self._target = span, epath.Path(workdir) / FOLDER
        self._remote = "://" in str(self._target)
        self._folder: Path | None = None  # where a trace is being written to

    def __enter__(self) -> "Tracer":
        """Nothing yet: the first image decides."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Completes a trace that the loop's end cuts short."""
        if self._folder is not None:
            self._stop()
        elif self._span is not None:
            start, stop = self._span
            self._say(f"no trace: no step began from {start} to {stop} images")

    def at(self, position: int, pending: Any = None) -> None:
        """Starts or stops; call before every step.

        Args:
          position: images passed so far.
          pending: what the devices are still computing. It is waited for where the
            trace starts or stops, so that it holds the steps of its span, whole.
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
        except Exception as error:  # of the profiler's, of many kinds
            self._span = None
            self._say(f"no trace: {error}")

    def _stop(self) -> None:
        folder, self._folder, self._span = self._folder, None, None
        assert folder is not None, "a trace that was not started cannot stop"
        try:
            jax.profiler.stop_trace()
            if self._remote:  # the profiler writes local files only
                _upload(folder, self._target)
        except Exception as error:
            self._say(f"the trace is lost: {error}")

    def _say(self, text: str) -> None:
        print(f"warning: --profile: {text}", file=sys.stderr)


def _upload(folder: Path, target: Any) -> None:
    """Moves the files of a local folder to a remote one."""
    for source in (path for path in folder.rglob("*") if path.is_file()):
        copy = target / source.relative_to(folder).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    shutil.rmtree(folder)
