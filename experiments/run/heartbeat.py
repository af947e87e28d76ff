"""A sign of life: `alive.json` in the workdir says that a run lives, and what it does.

    phase, images --Heartbeat, every 5 s--> alive.json --judge--> alive, or not since

A thread of its own writes it, so that a long compilation or factorization counts as
alive and a slow disk never holds up the run. Of many processes only the first writes.
"""

import json
import os
import shlex
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments.run import stopping
from sinder_jax import cli

FILE = "alive.json"
EVERY = 5.0  # seconds between two signs of life
SILENT = 30.0  # seconds without one: dead, where the process itself cannot be looked at
HISTORY = 60  # pairs of time and images, for the rate: five minutes of them or more
LAST_WORDS = 10.0  # seconds the end of a run waits for the last write
# A phase that begins like this is the last one.
ENDS = ("finished", "stopped", "failed")


class Heartbeat:
    """Writes `alive.json`, whole or not at all; use as a context manager.

    Leaving the block ends it as "finished", or as "failed: ..." where an exception
    passes, unless the phase already says how the run ended. That it cannot be written
    is nobody's concern here: the run will find out itself.

    Args:
      workdir: a `pathlib.Path` or an `etils.epath.Path`, which may be remote.
      devices: as text, such as "8 x TPU v4".
      processes: how many there are.
      command: what started the run; None: this process's own command line.
      writes: False for the processes that leave it to another one.
    """

    def __init__(
        self,
        workdir: Any,
        *,
        devices: str = "",
        processes: int = 1,
        command: str | None = None,
        writes: bool = True,
    ):
        now = time.time()
        self._writes = writes
        self._path = workdir / FILE
        self._facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "started": now,
            "time": now,
            "phase": "loading",
            "images": 0,
            "history": [],
            "devices": devices,
            "processes": processes,
            "command": own_command() if command is None else command,
        }
        self._changed, self._closing = threading.Event(), False
        self._thread = threading.Thread(
            target=self._beat, name="heartbeat", daemon=True
        )

    def __enter__(self) -> "Heartbeat":
        """Writes the first sign of life and keeps on."""
        if self._writes:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Writes how the run ended."""
        if not self._facts["phase"].startswith(ENDS):
            self._facts["phase"] = _ending(error)
        self._closing = True
        self._changed.set()
        if self._writes:
            self._thread.join(LAST_WORDS)  # not for ever: the disk may hang

    def phase(self, text: str) -> None:
        """What the run does from now on; written at once, by the thread."""
        self._facts["phase"] = " ".join(text.split())
        self._changed.set()

    def devices(self, text: str, processes: int) -> None:
        """What the run computes on, once that is known."""
        self._facts |= {"devices": text, "processes": processes}

    def images(self, passed: int) -> None:
        """How many images the run has passed."""
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
        # An object of a bucket appears whole; a file does by its renaming.
        remote = "://" in str(self._path)
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            text = json.dumps(self._facts | {"time": now}) + "\n"
            (self._path if remote else partial).write_text(text)
            if not remote:
                partial.replace(self._path)
        # A remote disk's client raises what it likes; the next beat tries again.
        except Exception:
            pass


def _ending(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, KeyboardInterrupt):
        return "stopped: Ctrl-C"
    if isinstance(error, stopping.Stopped):
        return f"stopped: {error}"
    if isinstance(error, SystemExit):
        return f"stopped: exit code {error.code}"
    return f"failed: {cli.one_line(error)}"


def own_command() -> str:
    """This process's command line, to be typed again."""
    program = sys.argv[0]
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None)
    start = [Path(sys.executable).name, *(["-m", module] if module else [program])]
    return shlex.join([*start, *sys.argv[1:]])


# --- Judged from outside --------------------------------------------------------------


class Life(NamedTuple):
    """Whether a run is alive.

    Attributes:
      alive: the judgement.
      age: seconds since the last sign of life, by this machine's clock.
      seen: the process itself could be looked for; otherwise only `age` counts.
    """

    alive: bool
    age: float
    seen: bool


def judge(facts: dict[str, Any], *, now: float) -> Life:
    """Whether the run that wrote this `alive.json` still lives.

    On the same machine the process is looked for: by its number and the moment it
    began, since numbers are given again. Elsewhere, in another container too, a sign of
    life younger than 30 s counts; the clocks of the two machines should agree.

    Args:
      facts: what `alive.json` holds.
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


def refuse_if_alive(workdir: Any) -> None:
    """Refuses a workdir in which another run is writing.

    A run of another machine that was alive a moment ago is given time to prove it.

    Args:
      workdir: as for `Heartbeat`.

    Raises:
      ValueError: another process writes there; says which.
    """
    first = _read(workdir)
    if first is None or not judge(first, now=time.time()).alive:
        return
    if first["process"] and first["process"] == _process(os.getpid()):
        return  # ourselves, a while ago
    now, facts = time.monotonic(), first
    while not judge(facts, now=time.time()).seen and facts["time"] == first["time"]:
        if time.monotonic() - now > SILENT:
            return
        time.sleep(1.0)
        facts = _read(workdir) or first
    if judge(facts, now=time.time()).alive:
        raise ValueError(
            f"another run writes to {workdir}: process {facts['pid']} on "
            f"{facts['host']}, {facts['phase']}. Stop it, or choose another --workdir"
        )


def _read(workdir: Any) -> dict[str, Any] | None:
    try:
        return json.loads((workdir / FILE).read_text())
    except Exception:  # not there yet, or a remote disk's client raises what it likes
        return None


def _process(pid: int) -> dict[str, str] | None:
    """The process space and start of a live process; None: none, or not Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except (OSError, IndexError):
        return None
    state, start = fields[0], fields[19]  # the third and the 22nd of proc(5)
    return None if state in "ZX" else {"space": f"{boot} {space}", "start": start}
