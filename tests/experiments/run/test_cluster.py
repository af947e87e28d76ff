"""run/cluster.py without a cluster; `test_processes.py` has real ones."""

import argparse

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
    monkeypatch.setattr(cluster, "launcher", lambda environ: None)
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


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "4",
}


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({}, None),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),  # one task of a job
        ({"SLURM_NTASKS": "2"}, None),  # a shell inside an allocation, without srun
        (OPEN_MPI, "Open MPI"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_launchers_are_recognized(environ, kind):
    assert cluster.launcher(environ) == kind


def test_a_tpu_host_is_recognized(monkeypatch):
    monkeypatch.setattr(cluster.Path, "exists", lambda self: str(self) == "/dev/accel0")
    assert cluster.launcher({}) is None  # the device of another driver
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    assert cluster.launcher({}) == "TPU"


def test_alone_everything_is_agreed_on():
    alone = cluster.Cluster()
    tree = {"a": np.array([-0.0, 1.0])}
    assert alone.from_first(tree) is tree
    assert alone.gather(True) == [True] and alone.gather(False) == [False]
    alone.check_same("configs", "text")
    alone.barrier()
    vote = cluster.Vote(alone, jax.local_devices()[:1])
    assert vote(True) is True and vote(False) is False


def test_one_devices_vote_is_the_answer_of_all():
    """With two devices of this process as two processes' votes."""
    several = cluster.Cluster(0, 2)
    vote = cluster.Vote(several, jax.local_devices())
    assert not bool(vote(False))
    assert bool(vote(True))
