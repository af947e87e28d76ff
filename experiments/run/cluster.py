"""The processes of a run: one on a single machine, one or more a host on a pod.

    environment, --coordinator ... --start--> Cluster, with JAX connected
    any process: stop --Vote, with every step--> all processes stop after the same step

Nothing has to be set on one machine. On a TPU pod, under Slurm and under Open MPI, JAX
finds the others by itself; elsewhere every process is told by --coordinator,
--num-processes and --process-id.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from experiments.run import peers
from experiments.run.peers import PATIENCE, Meeting, Peers
from sinder_jax import cli, repair

CONNECT_SECONDS = 300  # that a process waits for process 0
# Where JAX finds another process dead it ends this one by a signal; `peers` is first.
JAX_HEARTBEAT_SECONDS = 300
ARGUMENTS = ("coordinator", "num_processes", "process_id")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says where the other processes are."""
    group = parser.add_argument_group(
        "several processes", "found without these on TPU pods, Slurm and Open MPI"
    )
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 runs, a free port")
    add("--num-processes", type=int, metavar="N", help="how many processes there are")
    add("--process-id", type=int, metavar="I", help="which this is, from 0")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses an incomplete or impossible description of the processes.

    Raises:
      ValueError: says what is missing, or what is out of range.
    """
    given = {name: getattr(args, name) for name in ARGUMENTS}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(
            f"several processes need all of --coordinator, --num-processes and "
            f"--process-id: {flags} not given"
        )
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator={args.coordinator} must be HOST:PORT, such as 10.0.0.2:8476"
        )
    if args.num_processes < 1 or not 0 <= args.process_id < args.num_processes:
        raise ValueError(
            f"--process-id={args.process_id} must be from 0 to "
            f"--num-processes={args.num_processes} minus 1"
        )


def around(environ: Mapping[str, str]) -> str | None:
    """The kind of cluster that this process was started in by a launcher, if any."""
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    several = int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    if "OMPI_MCA_orte_hnp_uri" in environ and several:
        return "Open MPI"
    on_tpu = any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    if on_tpu and importlib.util.find_spec("libtpu"):
        return "TPU"
    return None


@dataclasses.dataclass
class Cluster:
    """All processes of a run, as seen by one of them; made by `start`.

    As a context manager it ends them together: one that leaves by an exception is gone
    for the others, and they end as well.

    Attributes:
      process: number of this process.
      processes: how many there are.
    """

    process: int = 0
    processes: int = 1
    _peers: Peers | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes and tells."""
        return self.process == 0

    def say(self, *parts: Any) -> None:
        """Prints, on process 0 alone."""
        if self.is_first:
            print(*parts, flush=True)

    # --- What all know --------------------------------------------------------------

    def from_first(self, tree: Any) -> Any:
        """Arrays as process 0 has them, bit for bit; every process gives its shapes."""
        if self.processes == 1:
            return tree
        arrays = jax.tree.map(np.asarray, tree)
        # As bytes: the sum by which JAX sends them would make 0 of -0.
        sent = jax.tree.map(lambda x: np.frombuffer(x.tobytes(), np.uint8), arrays)
        received = multihost_utils.broadcast_one_to_all(sent)
        return jax.tree.map(
            lambda data, x: (
                np.frombuffer(np.asarray(data, np.uint8).tobytes(), x.dtype)
                .reshape(x.shape)
                .copy()
            ),
            received,
            arrays,
        )

    def all_say(self, yes: bool) -> list[bool]:
        """What each process says, in their order; waits for all of them."""
        if self.processes == 1:
            return [yes]
        said = multihost_utils.process_allgather(np.array([yes]))
        return [bool(each) for each in np.ravel(said)]

    def everyone(self, yes: bool) -> bool:
        """Whether all processes say yes; waits for all of them."""
        return all(self.all_say(yes))

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.everyone(True)

    def check_same(self, what: str, text: str) -> None:
        """Refuses processes that were started differently.

        Raises:
          ValueError: `text` is not the same in all of them; raised in all.
        """
        digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        if not self.everyone(np.array_equal(self.from_first(digest), digest)):
            raise ValueError(
                f"the {self.processes} processes were started with different {what}: "
                "give all of them the same"
            )

    def wait_for(self, there: Callable[[], bool], seconds: float = 1.0) -> None:
        """Waits for something that process 0 makes, by asking again and again."""
        while not there():
            time.sleep(seconds)

    # --- Together to the end ----------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._peers is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a process died; the thread that watches them says which.
            time.sleep(PATIENCE)
        elif error is not None:
            self._peers.fail()
        if error is None:
            self.barrier()
            if not self.is_first:
                jax.distributed.shutdown()
            self._peers.close()
            if self.is_first:
                jax.distributed.shutdown()


def start(args: argparse.Namespace) -> Cluster:
    """Connects this process to the others of its run, where there are others.

    Before any computation of JAX.

    Args:
      args: parsed by a parser that `add_arguments` extended.

    Raises:
      ValueError: the arguments make no sense together.
      OSError: the others cannot be reached.
    """
    check_arguments(args)
    if args.coordinator is None and around(os.environ) is None:
        return Cluster()
    if args.coordinator and args.process_id:
        _wait_for_coordinator(args.coordinator)
    # A dead process is found and told by `peers`, stops are agreed on by `Vote`.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            cluster_detection_method="deactivate" if args.coordinator else None,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
        )
        cluster = Cluster(jax.process_index(), jax.process_count())
    except RuntimeError as error:
        raise OSError(f"the other processes cannot be reached: {error}") from None
    if cluster.processes > 1:
        peers.end_instead_of_abort(
            peers.gone(0, "its coordination service is"), cli.TRY_AGAIN
        )
        cluster._peers = Peers(
            cluster.process, cluster.processes, _first_host(), _exchange(cluster)
        )
    return cluster


def _wait_for_coordinator(address: str) -> None:
    """Waits until process 0 listens; JAX itself would end this one by a signal."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= until:
                raise OSError(
                    f"--coordinator={address} cannot be reached: {error}. Process 0 "
                    "must run there, and the port be open"
                ) from None
            time.sleep(0.5)


def _first_host() -> str:
    """Address of process 0, which JAX was told or has found."""
    from jax._src import distributed  # no public name gives it

    return str(distributed.global_state.coordinator_address).rpartition(":")[0]


def _exchange(cluster: Cluster) -> Callable[[Meeting], Meeting]:
    def exchange(meeting: Meeting) -> Meeting:
        token = np.frombuffer(meeting.token, np.uint8)
        port, token = cluster.from_first((np.int32(meeting.port), token))
        return Meeting(int(port), np.asarray(token, np.uint8).tobytes())

    return exchange


class Vote:
    """Whether any process wants to stop, asked with every step and read a step late.

    All processes read the same answer after the same step, so they stop together. It
    travels beside the step, whose metrics are read late as well: nothing waits for it.

    Args:
      cluster: the processes.
      devices: of the step.
    """

    def __init__(self, cluster: Cluster, devices: Sequence[jax.Device]):
        self._alone = cluster.processes == 1
        own = [device for device in devices if device.process_index == cluster.process]
        self._own = len(own)
        self._any = jax.pmap(
            lambda stop: lax.pmax(stop, "devices"), "devices", devices=tuple(devices)
        )

    def __call__(self, stop: bool) -> Any:
        """Casts a vote; the answer is read by `bool(Vote.answer(...))` later."""
        return stop if self._alone else self._any(np.full(self._own, stop, np.int32))

    @staticmethod
    def answer(vote: Any) -> bool:
        """Waits for the answer to a vote."""
        return vote if isinstance(vote, bool) else bool(repair.unreplicate(vote))
