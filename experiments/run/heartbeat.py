"""Signs of life: `alive.json` in the workdir says that a run is alive and what it does.

    phase, images --Heartbeat, every 5 s--> alive.json, judged by `alive`

A thread writes the file, so that a run counts as alive during a long compilation or
factorization, and never waits for a slow disk. Only process 0 writes.
"""

import json
import shlex
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.run import alive, stopping
from experiments.run.claim import Claim
from sinder_jax import cli
from sinder_jax.storage import files, run_files
from sinder_jax.storage.paths import AnyPath

EVERY = 5.0  # seconds between two signs of life
HISTORY = 60  # pairs of time and images, for the rate: five minutes or more
LAST_WORDS = 10.0  # seconds that the end of a run waits for the last write


class Heartbeat:
    """Writes `alive.json`; use as a context manager.

    Leaving the block writes "finished", or "failed: ..." after an exception, unless the
    phase already says how the run ended. Errors of writing are ignored here: the run
    meets them itself.

    Args:
      workdir: a folder of a disk or a bucket.
      devices: as text, such as "8 x TPU v4".
      processes: how many there are.
      writes: False for processes that leave writing to process 0.
      claim: the run's claim to the workdir, by which it writes; None without claims.
    """

    def __init__(
        self,
        workdir: AnyPath,
        devices: str = "",
        processes: int = 1,
        *,
        writes: bool = True,
        claim: Claim | None = None,
    ):
        self._writes, self._claim = writes, claim
        self._path = workdir / run_files.ALIVE
        self._facts: dict[str, Any] = {
            **alive.this_process(),
            "claim": 0 if claim is None else claim.number,
            "phase": "loading",
            "images": 0,
            "history": [],
            "devices": devices,
            "processes": processes,
            "command": own_command(),
        }
        self._changed, self._closing = threading.Event(), False
        self._thread = threading.Thread(
            target=self._beat, name="heartbeat", daemon=True
        )

    def __enter__(self) -> "Heartbeat":
        """Starts the thread that writes."""
        if self._writes:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Writes how the run ended and stops the thread."""
        if not self._facts["phase"].startswith(alive.ENDS):
            self._facts["phase"] = _ending(error)
        self._closing = True
        self._changed.set()
        if self._writes:
            self._thread.join(LAST_WORDS)  # the disk may hang

    def phase(self, text: str) -> None:
        """Sets what the run does from now on; the thread writes it at once."""
        self._facts["phase"] = " ".join(text.split())
        self._changed.set()

    def images(self, passed: int) -> None:
        """Sets how many images the run has passed."""
        self._facts["images"] = passed

    def _beat(self) -> None:
        while not self._closing:
            self._write()
            self._changed.wait(EVERY)
            self._changed.clear()
        self._write()

    def _write(self) -> None:
        now, passed = time.time(), self._facts["images"]
        history = self._facts["history"]
        if not history or history[-1][1] != passed:
            self._facts["history"] = [*history[1 - HISTORY :], (now, passed)]
        # A bucket's client may raise anything; the next beat tries again.
        with suppress(Exception):
            content = json.dumps(self._facts | {"time": now}) + "\n"
            if self._claim is None:
                files.write(self._path, content)
            else:
                self._claim.write(run_files.ALIVE, content)


def _ending(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, stopping.Stopped):
        return f"stopped: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped: Ctrl-C"
    if isinstance(error, SystemExit):
        return f"stopped: exit code {error.code}"
    return f"failed: {cli.one_line(error)}"


def own_command() -> str:
    """This process's command line, ready to be typed again."""
    program = sys.argv[0]
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None)
    start = [Path(sys.executable).name, *(["-m", module] if module else [program])]
    return shlex.join([*start, *sys.argv[1:]])
