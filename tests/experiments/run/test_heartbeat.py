"""The sign of life: written whole, at once on a new phase, and judged from outside."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

import bucket
from experiments.run import heartbeat, stopping
from experiments.run.heartbeat import Heartbeat, judge
from sinder_jax.storage import paths


def facts(workdir):
    return json.loads((workdir / "alive.json").read_text())


def until(condition):
    """Waits for the thread; ten seconds are much more than it needs."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "nothing was written"
        time.sleep(0.01)


def written(workdir):
    until((workdir / "alive.json").exists)
    return facts(workdir)


@pytest.mark.parametrize("make", [lambda path: path, epath.Path], ids=["path", "epath"])
def test_a_run_says_what_it_does_and_on_what(make, tmp_path):
    with Heartbeat(make(tmp_path), devices="2 x cpu", processes=3) as alive:
        first = written(tmp_path)
        assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
        assert (first["devices"], first["processes"]) == ("2 x cpu", 3)
        assert first["phase"] == "loading"
        alive.images(7)
        alive.phase("repairing")
        until(lambda: facts(tmp_path)["phase"] == "repairing")
        assert facts(tmp_path)["images"] == 7
        assert [images for _, images in facts(tmp_path)["history"]] == [0, 7]
    assert facts(tmp_path)["phase"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["alive.json"]


def test_it_beats_while_nothing_else_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)
    with Heartbeat(tmp_path):
        first = written(tmp_path)["time"]
        until(lambda: facts(tmp_path)["time"] > first)


def test_it_is_seldom_written_where_nothing_changes(tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr(Heartbeat, "_write", lambda self: count.append(1))
    with Heartbeat(tmp_path) as alive:
        for passed in range(1000):
            alive.images(passed)
        until(lambda: count)
    assert len(count) == 2  # the first and the last


@pytest.mark.parametrize(
    ("error", "phase"),
    [
        (ValueError("no\n  space"), "failed: no space"),
        (FloatingPointError("loss"), "failed: loss"),
        (KeyboardInterrupt(), "stopped: Ctrl-C"),
        (stopping.Stopped("SIGTERM"), "stopped: SIGTERM"),
        (SystemExit(75), "stopped: exit code 75"),
    ],
)
def test_the_last_phase_says_how_it_ended(error, phase, tmp_path):
    with pytest.raises(type(error)), Heartbeat(tmp_path):
        raise error
    assert facts(tmp_path)["phase"] == phase


def test_an_ending_that_was_said_is_kept(tmp_path):
    with pytest.raises(SystemExit), Heartbeat(tmp_path) as alive:
        alive.phase("stopped: preempted")
        raise SystemExit(75)
    assert facts(tmp_path)["phase"] == "stopped: preempted"


def test_a_disk_that_fails_is_the_runs_own_concern(tmp_path, monkeypatch):
    def full(self):
        raise OSError("no space left on device")

    with Heartbeat(tmp_path / "gone") as alive:
        alive.phase("repairing")
    monkeypatch.setattr(heartbeat.json, "dumps", lambda facts: full(None))
    with Heartbeat(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_sign_of_life_reaches_a_bucket(tmp_path, monkeypatch):
    bucket.install(monkeypatch, tmp_path)
    (tmp_path / "b" / "run").mkdir(parents=True)
    with Heartbeat(paths.as_path("gs://b/run")):
        until(lambda: (tmp_path / "b" / "run" / "alive.json").exists())
    assert facts(tmp_path / "b" / "run")["phase"] == "finished"


def test_the_history_is_bounded_and_ends_with_the_newest(tmp_path):
    alive = Heartbeat(tmp_path)
    for passed in range(200):
        alive.images(passed)
        alive._write()
    history = facts(tmp_path)["history"]
    assert len(history) == heartbeat.HISTORY and history[-1][1] == 199


# --- Judged from outside ----------------------------------------------------------


def sign(**changes):
    own = heartbeat._process(os.getpid())
    usual = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": own,
        "time": 1000.0,
        "phase": "repairing",
    }
    return usual | changes


linux = pytest.mark.skipif(
    heartbeat._process(os.getpid()) is None, reason="no /proc: only the age counts"
)


@linux
def test_here_a_silent_process_that_exists_is_alive():
    life = judge(sign(), now=9000.0)
    assert life == (True, 8000.0, True)


@linux
def test_here_a_process_that_is_gone_is_dead_at_once():
    # Python waits for a program on its stdin.
    child = subprocess.Popen([sys.executable], stdin=subprocess.PIPE)
    alive = sign(pid=child.pid, process=heartbeat._process(child.pid))
    assert judge(alive, now=1001.0).alive
    child.stdin.close()
    until(lambda: not judge(alive, now=1001.0).alive)  # a zombie is dead, too
    child.wait()
    assert not judge(alive, now=1001.0).alive


@linux
def test_here_another_process_of_the_same_number_is_not_the_run():
    other = heartbeat._process(os.getpid()) | {"start": "1"}
    assert not judge(sign(process=other), now=1001.0).alive


@pytest.mark.parametrize(("age", "alive"), [(29, True), (31, False), (-5, True)])
@pytest.mark.parametrize(
    "away",
    [
        {"host": "another"},
        {"process": {"space": "another container", "start": "1"}},
        {"process": None},
    ],
    ids=["host", "container", "no-proc"],
)
def test_elsewhere_the_age_counts(away, age, alive):
    life = judge(sign(pid=1, **away), now=1000.0 + age)
    assert life == (alive, max(age, 0), False)


@pytest.mark.parametrize("phase", ["finished", "stopped: preempted", "failed: loss"])
def test_an_ended_run_is_not_alive(phase):
    assert not judge(sign(phase=phase), now=1000.0).alive


def test_the_command_can_be_typed_again():
    program = [sys.executable, "-m", "own_command", "--config=tiny.py", "--workdir=a b"]
    out = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("-m own_command --config=tiny.py '--workdir=a b'")


# --- Two runs in one folder ---------------------------------------------------------


def test_a_workdir_of_a_living_run_is_refused(tmp_path):
    other = subprocess.Popen([sys.executable, "-m", "beating", str(tmp_path)])
    try:
        until(lambda: (tmp_path / "alive.json").exists() and written_phase(tmp_path))
        with pytest.raises(ValueError, match=f"process {other.pid} on ") as caught:
            heartbeat.refuse_if_alive(tmp_path)
        assert "another run writes to" in str(caught.value)
    finally:
        other.kill()
        other.wait()
    heartbeat.refuse_if_alive(tmp_path)  # it is dead: nobody has to wait
    with Heartbeat(tmp_path):
        until(lambda: facts(tmp_path)["pid"] == os.getpid())
        heartbeat.refuse_if_alive(tmp_path)  # that is us


def test_a_run_that_was_started_in_the_same_moment_is_another_one(
    tmp_path, monkeypatch
):
    """Start times are counted in hundredths of a second."""
    monkeypatch.setattr(heartbeat, "_process", lambda pid: {"space": "s", "start": "1"})
    own = sign(process={"space": "s", "start": "1"})
    (tmp_path / "alive.json").write_text(json.dumps(own))
    heartbeat.refuse_if_alive(tmp_path)  # that is us
    (tmp_path / "alive.json").write_text(json.dumps(own | {"pid": os.getpid() + 1}))
    with pytest.raises(ValueError, match="another run writes to"):
        heartbeat.refuse_if_alive(tmp_path)


def written_phase(workdir):
    return facts(workdir)["phase"] == "repairing"


@pytest.mark.parametrize("beats", [True, False])
def test_a_run_of_another_machine_may_prove_that_it_lives(beats, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENT", 2.0)
    told = {"host": "elsewhere", "pid": 7, "process": None, "phase": "repairing"}
    path = tmp_path / "alive.json"
    path.write_text(json.dumps({**told, "time": time.time()}))
    sleep = time.sleep

    def slept(seconds):
        if beats:
            path.write_text(json.dumps({**told, "time": time.time()}))
        sleep(min(seconds, 0.2))

    monkeypatch.setattr(heartbeat.time, "sleep", slept)
    if beats:
        with pytest.raises(ValueError, match="process 7 on elsewhere, repairing"):
            heartbeat.refuse_if_alive(tmp_path)
    else:
        heartbeat.refuse_if_alive(tmp_path)
