"""The sign of life: written whole, at once on a new phase."""

import json
import os
import socket
import subprocess
import sys

import pytest
from etils import epath

import bucket
from experiments.run import heartbeat, stopping
from experiments.run.heartbeat import Heartbeat
from sinder_jax.storage import paths
from waiting import until


def facts(workdir):
    return json.loads((workdir / "alive.json").read_text())


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


def test_the_command_can_be_typed_again():
    program = [sys.executable, "-m", "own_command", "--config=tiny.py", "--workdir=a b"]
    out = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("-m own_command --config=tiny.py '--workdir=a b'")
