"""Is the run that left a sign of life in a workdir still alive?

alive.json, a claim --judge--> Life, by looking the process up or by the age
workdir --refuse_if_alive--> an error that names the other process
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sinder_jax.storage import run_files
from sinder_jax.storage.paths import AnyPath

SILENT = 30.0  # seconds of silence that mean dead, if the process cannot be looked up
# A phase that begins with one of these is the last one.
ENDS = ("finished", "stopped", "failed")


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
