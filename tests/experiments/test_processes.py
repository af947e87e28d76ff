"""Two processes over loopback: the main job, its stops, and what ends it.

Each has two simulated devices; one process with four of them is what they are held
against, with a thread pool of the same size (NPROC), which decides about bits.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import places

ROOT = places.ROOT
DEVICES = "--xla_force_host_platform_device_count"
SHORT = (
    "--config=tiny.py",
    "--config.images_per_step=4",
    "--config.max_iter=24",
    "--config.checkpoint_every=8",
    "--config.picture_every=1000",
    "--config.measure_images=1",
)
ENDLESS = (
    "--config.max_iter=100000",
    "--config.history=10000",
    "--config.stop_share=1.0",
)


class Processes:
    """`count` processes of one run, as they are started and as they end."""

    def __init__(self, count, workdir, *arguments, devices=2, own=()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.each = []
        for process in range(count):
            several = (
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={count}",
                f"--process-id={process}",
            )
            command = [
                *(sys.executable, "-m", "experiments.repair", *arguments),
                *(several if count > 1 else ()),
                *(own[process] if own else ()),
                f"--workdir={workdir[process] if own else workdir}",
            ]
            environment = os.environ | {"XLA_FLAGS": f"{DEVICES}={devices}"}
            self.each.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | {"NPROC": "8"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def ended(self, *codes, within=300):
        """Outputs and errors of all, which must end with these codes."""
        told = [process.communicate(timeout=within) for process in self.each]
        got = tuple(process.returncode for process in self.each)
        assert got == codes, [errors for _, errors in told]
        return told


def errors_of(told):
    """What our program said on stderr; C++ libraries write there, too."""
    return [x for x in told[1].splitlines() if x.startswith(("error", "warning"))]


def wait_for_steps(workdir, count=1):
    deadline = time.monotonic() + 200
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    Processes(1, workdir, *SHORT, devices=4).ended(0)
    return workdir


def assert_same(one, two):
    for name in ("metrics.jsonl", "repaired.safetensors", "repaired.patch.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    got, want = (json.loads((path / "summary.json").read_text()) for path in (one, two))
    for told in (got, want):
        del told["seconds"]
    assert got == want


def test_two_processes_give_the_bytes_of_one_from_data_to_export(alone, tmp_path):
    """Stopped on the way by a signal to one of them alone."""
    workdir = tmp_path / "run"
    two = Processes(2, workdir, *SHORT)
    wait_for_steps(workdir, 4)
    two.each[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    told = two.ended(75, 75)
    assert time.monotonic() - began < 30  # seconds; on an idle machine two
    stopped = json.loads((workdir / "summary.json").read_text())
    assert stopped["finished"] is False and stopped["images"] % 4 == 0
    assert [name for name in contents(workdir) if "repaired" in name] == []
    assert errors_of(told[0]) == errors_of(told[1]) == []
    told = Processes(2, workdir, *SHORT).ended(0, 0)
    assert f"going on after {stopped['images']} images" in told[0][0]
    assert "4 images a step on 4 x cpu" in told[0][0]
    assert "photographs" not in told[1][0]  # only the first one tells
    assert_same(workdir, alone)


@pytest.mark.slow
def test_each_of_them_is_missed_by_the_other(alone, tmp_path):
    for victim in (0, 1):
        workdir = tmp_path / f"run{victim}"
        two = Processes(2, workdir, *SHORT, *ENDLESS)
        wait_for_steps(workdir, 12)
        two.each[victim].kill()
        began = time.monotonic()
        codes = (-9, 75) if victim == 0 else (75, -9)
        told = two.ended(*codes, within=60)
        assert time.monotonic() - began < 30
        (line,) = errors_of(told[1 - victim])
        assert f"process {victim} of this run is gone" in line
        assert "Traceback" not in told[1 - victim][1]


@pytest.mark.slow
def test_a_process_that_hangs_is_missed_after_half_a_minute(tmp_path):
    workdir = tmp_path / "run"
    two = Processes(2, workdir, *SHORT, *ENDLESS)
    wait_for_steps(workdir, 12)
    two.each[0].send_signal(signal.SIGSTOP)
    _, errors = two.each[1].communicate(timeout=60)
    assert two.each[1].returncode == 75
    assert "process 0 of this run is gone (silent for 3" in errors
    two.each[0].kill()
    two.ended(-9, 75)


@pytest.mark.slow
def test_differences_between_processes_are_refused_by_both(tmp_path):
    folders = (tmp_path / "run", tmp_path / "run")
    own = ((), ("--config.lr=0.5",))
    told = Processes(2, folders, *SHORT, own=own).ended(2, 2)
    for each in told:
        (line,) = errors_of(each)
        assert line == (
            "error: the 2 processes were started with different configs: give all of "
            "them the same"
        )
    apart = (tmp_path / "a", tmp_path / "b")
    told = Processes(2, apart, *SHORT, own=((), ())).ended(2, 2)
    for each in told:
        (line,) = errors_of(each)
        assert "is not one folder for all 2 processes: 1 cannot see" in line
