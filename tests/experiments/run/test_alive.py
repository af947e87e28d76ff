"""run/alive.py: is the run that left a sign of life still there?"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from experiments.run import alive
from experiments.run.alive import judge
from experiments.run.heartbeat import Heartbeat
from waiting import until


def facts(workdir):
    return json.loads((workdir / "alive.json").read_text())


def sign(**changes):
    own = alive._process(os.getpid())
    usual = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": own,
        "time": 1000.0,
        "phase": "repairing",
    }
    return usual | changes


linux = pytest.mark.skipif(
    alive._process(os.getpid()) is None, reason="no /proc: only the age counts"
)


@linux
def test_here_a_silent_process_that_exists_is_alive():
    life = judge(sign(), now=9000.0)
    assert life == (True, 8000.0, True)


@linux
def test_here_a_process_that_is_gone_is_dead_at_once():
    # Python waits for a program on its stdin.
    child = subprocess.Popen([sys.executable], stdin=subprocess.PIPE)
    told = sign(pid=child.pid, process=alive._process(child.pid))
    assert judge(told, now=1001.0).alive
    child.stdin.close()
    until(lambda: not judge(told, now=1001.0).alive)  # a zombie is dead, too
    child.wait()
    assert not judge(told, now=1001.0).alive


@linux
def test_here_another_process_of_the_same_number_is_not_the_run():
    other = alive._process(os.getpid()) | {"start": "1"}
    assert not judge(sign(process=other), now=1001.0).alive


@pytest.mark.parametrize(("age", "lives"), [(29, True), (31, False), (-5, True)])
@pytest.mark.parametrize(
    "away",
    [
        {"host": "another"},
        {"process": {"space": "another container", "start": "1"}},
        {"process": None},
    ],
    ids=["host", "container", "no-proc"],
)
def test_elsewhere_the_age_counts(away, age, lives):
    life = judge(sign(pid=1, **away), now=1000.0 + age)
    assert life == (lives, max(age, 0), False)


@pytest.mark.parametrize("phase", ["finished", "stopped: preempted", "failed: loss"])
def test_an_ended_run_is_not_alive(phase):
    assert not judge(sign(phase=phase), now=1000.0).alive


# --- Two runs in one folder ---------------------------------------------------------


def test_a_workdir_of_a_living_run_is_refused(tmp_path):
    other = subprocess.Popen([sys.executable, "-m", "beating", str(tmp_path)])
    try:
        until(lambda: (tmp_path / "alive.json").exists() and written_phase(tmp_path))
        with pytest.raises(ValueError, match=f"process {other.pid} on ") as caught:
            alive.refuse_if_alive(tmp_path)
        assert "another run writes to" in str(caught.value)
    finally:
        other.kill()
        other.wait()
    alive.refuse_if_alive(tmp_path)  # it is dead: nobody has to wait
    with Heartbeat(tmp_path):
        until(lambda: facts(tmp_path)["pid"] == os.getpid())
        alive.refuse_if_alive(tmp_path)  # that is us


def test_a_run_that_was_started_in_the_same_moment_is_another_one(
    tmp_path, monkeypatch
):
    """Start times are counted in hundredths of a second."""
    monkeypatch.setattr(alive, "_process", lambda pid: {"space": "s", "start": "1"})
    own = sign(process={"space": "s", "start": "1"})
    (tmp_path / "alive.json").write_text(json.dumps(own))
    alive.refuse_if_alive(tmp_path)  # that is us
    (tmp_path / "alive.json").write_text(json.dumps(own | {"pid": os.getpid() + 1}))
    with pytest.raises(ValueError, match="another run writes to"):
        alive.refuse_if_alive(tmp_path)


def written_phase(workdir):
    return facts(workdir)["phase"] == "repairing"


@pytest.mark.parametrize("beats", [True, False])
def test_a_run_of_another_machine_may_prove_that_it_lives(beats, tmp_path, monkeypatch):
    monkeypatch.setattr(alive, "SILENT", 2.0)
    told = {"host": "elsewhere", "pid": 7, "process": None, "phase": "repairing"}
    path = tmp_path / "alive.json"
    path.write_text(json.dumps({**told, "time": time.time()}))
    sleep = time.sleep

    def slept(seconds):
        if beats:
            path.write_text(json.dumps({**told, "time": time.time()}))
        sleep(min(seconds, 0.2))

    monkeypatch.setattr(alive.time, "sleep", slept)
    if beats:
        with pytest.raises(ValueError, match="process 7 on elsewhere, repairing"):
            alive.refuse_if_alive(tmp_path)
    else:
        alive.refuse_if_alive(tmp_path)
