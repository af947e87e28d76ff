"""Signs of life: `alive.json` in the workdir says that a run is alive and what it does.

    phase, images --Heartbeat, every 5 s--> alive.json --judge--> alive or dead

A thread writes the file, so that a run counts as alive during a long compilation or
factorization, and never waits for a slow disk. Only process 0 writes.
"""

import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.run import stopping
from sinder_jax import cli
from sinder_jax.storage import files, run_files
from sinder_jax.storage.paths import AnyPath

if TYPE_CHECKING:
    from experiments.run.claim import Claim

EVERY = 5.0  # seconds between two signs of life
SILENT = 30.0  # seconds of silence that mean dead, if the process cannot be looked up
HISTORY = 60  # pairs of time and images, for the rate: five minutes or more
LAST_WORDS = 10.0  # seconds that the end of a run waits for the last write
# A phase that begins with one of these is the last one.
ENDS = ("finished", "stopped", "failed")


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
        claim: "Claim | None" = None,
    ):
        self._writes, self._claim = writes, claim
        self._path = workdir / run_files.ALIVE
        self._facts: dict[str, Any] = {
            **this_process(),
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
        if not self._facts["phase"].startswith(ENDS):
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


def this_process() -> dict[str, Any]:
    """What identifies this process to others, and the time."""
    now = time.time()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": _process(os.getpid()),
        "started": now,
        "time": now,
    }


def own_command() -> str:
    """This process's command line, ready to be typed again."""
    program = sys.argv[0]
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None)
    start = [Path(sys.executable).name, *(["-m", module] if module else [program])]
    return shlex.join([*start, *sys.argv[1:]])


# --- Judged from outside --------------------------------------------------------------


class Life(NamedTuple):
    """Whether a run is alive, and how that was found out.

    Attributes:
      alive: True if the run counts as alive.
      age: seconds since the last sign of life, by this machine's clock.
      seen: True if the process could be looked up; otherwise only `age` counts.
    """

    alive: bool
    age: float
    seen: bool


def judge(facts: Mapping[str, Any], *, now: float) -> Life:
    """Tells if the run that wrote this `alive.json` is still alive.

    On the same machine the process is looked up, by its number and its start time:
    numbers are used again. Elsewhere, also in another container, a sign of life younger
    than 30 s counts; the clocks of the two machines should agree.

    Args:
      facts: the content of `alive.json`.
      now: seconds, Unix time.
    """
    age = max(0.0, now - facts["time"])
    if facts["phase"].startswith(ENDS):
        return Life(False, age, False)
    written = facts.get("process")
    here = _process(os.getpid())
    same_machine = facts["host"] == socket.gethostname()
    if same_machine and written and here and written["space"] == here["space"]:
        return Life(_process(facts["pid"]) == written, age, True)
    return Life(age < SILENT, age, False)


def refuse_if_alive(workdir: AnyPath, claim: Mapping[str, Any] | None = None) -> None:
    """Refuses a workdir in which another run is writing.

    Waits for a sign of life of a run on another machine that was alive a moment ago.

    Args:
      workdir: as for `Heartbeat`.
      claim: what the newest claim to the workdir says, None if there is none.

    Raises:
      ValueError: another process writes there; says which.
    """
    first = _newest_sign(workdir, claim)
    if first is None or not judge(first, now=time.time()).alive:
        return
    own = _process(os.getpid())
    # With its number: start times are counted in hundredths of a second.
    if own and (first["pid"], first["process"]) == (os.getpid(), own):
        return  # ourselves, a while ago
    now, facts = time.monotonic(), first
    while not judge(facts, now=time.time()).seen and facts["time"] == first["time"]:
        if time.monotonic() - now > SILENT:
            return
        time.sleep(1.0)
        facts = _newest_sign(workdir, claim) or first
    if judge(facts, now=time.time()).alive:
        raise ValueError(
            f"another run writes to {workdir}: process {facts['pid']} on "
            f"{facts['host']}, {facts['phase']}; stop it, or choose another --workdir"
        )


def _newest_sign(
    workdir: AnyPath, claim: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """alive.json; or the claim, if it has ended or its run has written none yet."""
    try:
        alive = run_files.read_json(workdir / run_files.ALIVE)
    except Exception:  # not written yet, or a bucket's client fails
        alive = None
    if claim is None:
        return alive
    ended = claim["phase"].startswith(ENDS)
    same = alive is not None and alive.get("claim") == claim["claim"]
    return alive if same and not ended else claim


def _process(pid: int) -> dict[str, str] | None:
    """PID namespace and start time of a live process; None if dead or not on Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except (OSError, IndexError):
        return None
    state, start = fields[0], fields[19]  # the third and the 22nd of proc(5)
    return None if state in "ZX" else {"space": f"{boot} {space}", "start": start}
