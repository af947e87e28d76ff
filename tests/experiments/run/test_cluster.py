"""run/cluster.py without a cluster; `test_processes.py` has real ones."""

import argparse
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.run import cluster
from samples import error_of


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    cluster.add_arguments(parser)
    return parser.parse_args(arguments)


def test_nothing_has_to_be_set_on_one_machine(monkeypatch):
    monkeypatch.setattr(cluster, "launched", lambda environ: None)
    alone = cluster.start(parsed())
    assert (alone.process, alone.processes, alone.is_first) == (0, 1, True)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--coordinator=host:1234"], "--num-processes, --process-id not given"),
        (["--process-id=0"], "--coordinator, --num-processes not given"),
        (
            ["--coordinator=host", "--num-processes=2", "--process-id=0"],
            "--coordinator=host must be HOST:PORT",
        ),
        (
            ["--coordinator=host:0", "--num-processes=2", "--process-id=0"],
            "must be HOST:PORT",
        ),
        (
            ["--coordinator=host:99999", "--num-processes=2", "--process-id=0"],
            "must be HOST:PORT",
        ),
        (
            ["--coordinator=host:1", "--num-processes=2", "--process-id=2"],
            "--process-id=2 must be from 0 to --num-processes=2 minus 1",
        ),
        (
            ["--coordinator=host:1", "--num-processes=0", "--process-id=0"],
            "--process-id=0 must be from 0",
        ),
    ],
)
def test_half_a_description_is_refused(arguments, told):
    assert told in error_of(cluster.start, parsed(*arguments))


def test_a_coordinator_that_is_not_there_gives_one_line(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    arguments = ["--coordinator=127.0.0.1:1", "--num-processes=2", "--process-id=1"]
    line = error_of(cluster.start, parsed(*arguments), kind=OSError)
    assert line.startswith("--coordinator=127.0.0.1:1 cannot be reached")


# What `srun` and `mpirun` of Open MPI 4 give each of their processes.
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
INTERACTIVE = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


def without(environ, *names):
    return {name: text for name, text in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (SLURM, ("slurm", 2, 1)),
        (without(SLURM, "SLURM_STEP_NUM_TASKS"), ("slurm", 2, 1)),  # an older Slurm
        (SLURM | {"SLURM_NTASKS": "8"}, ("slurm", 2, 1)),  # of a job of more tasks
        # One task of a job: the shell that salloc opens.
        (SLURM | INTERACTIVE, None),
        (SLURM | INTERACTIVE | OPEN_MPI, ("ompi", 4, 3)),  # and mpirun in that shell
        # A script of sbatch that does not use srun.
        (without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"), None),
        ({"SLURM_NTASKS": "2"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "two"}, None),
        (SLURM | {"PMI_SIZE": "2", "PMI_RANK": "1"}, ("slurm", 2, 1)),
        (OPEN_MPI, ("ompi", 4, 3)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
    ],
)
def test_launchers_are_recognized(environ, found):
    launch = cluster.launched(environ)
    assert (None if launch is None else launch[:3]) == found


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (without(SLURM, "SLURM_PROCID"), "SLURM_STEP_NUM_TASKS=2 but no SLURM_PROCID"),
        (
            without(SLURM, "SLURM_LOCALID"),
            "SLURM_STEP_NUM_TASKS=2 but no SLURM_LOCALID",
        ),
        (without(SLURM, "SLURM_JOB_ID"), "SLURM_STEP_NUM_TASKS=2 but no SLURM_JOB_ID"),
        (
            without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"),
            "OMPI_COMM_WORLD_SIZE=4 but no OMPI_COMM_WORLD_RANK",
        ),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4 but no PMI_RANK"),
    ],
)
def test_a_shell_that_inherits_some_of_the_variables_runs_alone(environ, told, capsys):
    assert cluster.launched(environ) is None
    assert capsys.readouterr().err == (
        f"warning: {told}: not one of several, runs alone\n"
    )


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        # Open MPI 5, and MPICH: the processes have numbers, but JAX knows no address.
        (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), "OMPI_COMM_WORLD_SIZE=4, but"),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, "PMI_SIZE=4, but"),
    ],
)
def test_processes_that_cannot_meet_are_refused(environ, told):
    line = error_of(cluster.launched, environ)
    assert line.startswith(f"{told} nothing tells JAX where process 0 is: add --coord")
    assert "--num-processes=4 --process-id=3, or to run alone unset " in line


# As `experiments.repair` runs it: a connection stays, and must not be in this process.
WAITS = """
import sys
from experiments import repair
from experiments.run import cluster
from sinder_jax import launch
cluster.CONNECT_SECONDS = int(sys.argv[1])
launch.exit_on_error(lambda: repair.main(sys.argv[2:]))
"""


def waiting(seconds, folder) -> subprocess.Popen:
    environ = SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "localhost"}
    call = [str(seconds), "--config=tiny.py", f"--workdir={folder / 'run'}"]
    return subprocess.Popen(
        [sys.executable, "-c", WAITS, *call],
        env=os.environ | environ,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_says_whom_it_waits_for_and_ends_in_one_line(tmp_path):
    process = waiting(2, tmp_path)
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()) == (
        2,
        [
            "waiting for 1 other process (SLURM_STEP_NUM_TASKS=2), up to 2 s; to "
            "run alone, unset SLURM_PROCID",
            "error: 1 other process (SLURM_STEP_NUM_TASKS=2) not found within 2 "
            "s: start all of them, or to run alone, unset SLURM_PROCID",
        ],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_at_once(number, tmp_path):
    process = waiting(300, tmp_path)
    assert process.stderr.readline().startswith("waiting for 1 other process")
    time.sleep(0.5)  # the line is out, but perhaps not off its buffer
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        75,
        f"stopped by {number.name}: run the same command to resume\n",
    )


def test_a_tpu_host_is_recognized(monkeypatch):
    monkeypatch.setattr(cluster.Path, "exists", lambda self: str(self) == "/dev/accel0")
    assert cluster.launched({}) is None  # the device of another driver
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    assert cluster.launched({})[:3] == (None, None, None)


def test_alone_everything_is_agreed_on():
    alone = cluster.Cluster()
    tree = {"a": np.array([-0.0, 1.0])}
    assert alone.from_first(tree) is tree
    assert alone.gather(True) == [True] and alone.gather(False) == [False]
    alone.check_same("configs", "text")
    alone.check_same("photographs", os.fsdecode(b"caf\xe9.jpg"))  # not UTF-8
    alone.barrier()
    vote = cluster.Vote(alone, jax.local_devices()[:1])
    assert vote(True) is True and vote(False) is False


def test_one_devices_vote_is_the_answer_of_all():
    """With two devices of this process as two processes' votes."""
    several = cluster.Cluster(0, 2)
    vote = cluster.Vote(several, jax.local_devices())
    assert not bool(vote(False))
    assert bool(vote(True))
