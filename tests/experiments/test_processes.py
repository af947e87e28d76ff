"""Two processes over loopback: the main job, its stops, and how it ends.

Each process has two simulated devices. They are compared to one process with four
devices and a thread pool of the same size (NPROC), which decides the bits.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import places

ROOT = places.ROOT
DEVICES = "--xla_force_host_platform_device_count"
SHORT = (
    "--config=tiny.py",
    "--config.images_per_step=4",
    "--config.max_iter=12",
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

    def __init__(self, count, workdir, *arguments, devices=2, own=(), under=()):
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
                *(*under, sys.executable, "-m", "experiments.repair", *arguments),
                *(several if count > 1 else ()),
                *(own[process] if own else ()),
                f"--workdir={workdir[process] if own else workdir}",
            ]
            environment = os.environ | {"XLA_FLAGS": f"{DEVICES}={devices}"}
            self.each.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | {"NPROC": "8", "WAIT": "2"},
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
    told = Processes(2, tmp_path / "run", *SHORT).ended(0, 0)
    assert "4 images per step on 4 x cpu" in told[0][0]
    assert "photographs" not in told[1][0]  # only the first one tells
    assert errors_of(told[0]) == errors_of(told[1]) == []
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_they_go_on_to_the_same_bytes(
    alone, tmp_path
):
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
    assert f"resuming after {stopped['images']} images" in told[0][0]
    assert "4 images per step on 4 x cpu" in told[0][0]
    assert "photographs" not in told[1][0]  # only the first one tells
    assert_same(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_or_hangs_ends_the_other(victim, number, tmp_path):
    workdir = tmp_path / "run"
    two = Processes(2, workdir, *SHORT, *ENDLESS)
    wait_for_steps(workdir, 12)
    two.each[victim].send_signal(number)
    began = time.monotonic()
    _, errors = two.each[1 - victim].communicate(timeout=60)
    assert two.each[1 - victim].returncode == -signal.SIGABRT
    assert time.monotonic() - began < 45  # seconds; the heartbeat's 30, and a load
    assert "JAX distributed service detected fatal errors" in errors
    assert "Traceback" not in errors
    two.each[victim].kill()
    two.each[victim].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_kill_both_go_on_under_until_done_to_the_same_bytes(victim, tmp_path):
    """The killed process (137) and the one that JAX ends (134) are started again."""
    longer = (*SHORT, *ENDLESS, "--config.max_iter=160")
    Processes(1, tmp_path / "alone", *longer, devices=4).ended(0)
    workdir = tmp_path / "run"
    two = Processes(2, workdir, *longer, under=[ROOT / "scripts" / "until_done.sh"])
    wait_for_steps(workdir, 12)
    script = two.each[victim].pid
    children = Path(f"/proc/{script}/task/{script}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    told = two.ended(0, 0)
    codes = {victim: 137, 1 - victim: 134}
    for process, (_, errors) in enumerate(told):
        assert f"exit code {codes[process]}: starting again in 2 s" in errors
    assert "resuming after" in told[0][0]
    assert_same(workdir, tmp_path / "alone")


@pytest.mark.slow
def test_an_error_of_one_process_alone_ends_the_other(tmp_path):
    workdir = tmp_path / "run"
    two = Processes(
        2, (workdir, workdir), *SHORT, own=((), ("--config.data=/nowhere",))
    )
    began = time.monotonic()
    told = two.ended(-signal.SIGABRT, 2, within=100)
    assert time.monotonic() - began < 75  # seconds; the heartbeat's 30 after a start
    assert errors_of(told[1]) == ["error: no such image folder: /nowhere"]


def test_all_processes_refuse_a_folder_that_holds_an_evaluation(tmp_path):
    (tmp_path / "config.json").write_text('{"protocol": "knn"}')
    before = contents(tmp_path)
    for each in Processes(2, tmp_path, *SHORT).ended(2, 2, within=100):
        (line,) = errors_of(each)
        assert line.endswith("holds an evaluation (knn): choose another --workdir")
    assert contents(tmp_path) == before


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
