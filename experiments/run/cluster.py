"""The processes of a run: one on a single machine, one or more per host on a pod.

    environment, --coordinator ... --start--> Cluster, with JAX connected
    any process: stop --Vote, with every step--> all processes stop after the same step

A single machine needs no settings. On a TPU pod, under Slurm and under Open MPI, JAX
finds the other processes by itself; elsewhere --coordinator, --num-processes and
--process-id tell each process. When a process dies, JAX aborts the others: SIGABRT,
exit code 134.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sinder_jax import cli
from sinder_jax.storage.paths import AnyPath

CONNECT_SECONDS = 300  # how long a process waits for the others at the start
HEARTBEAT_SECONDS = 30  # JAX counts a process silent for so long as dead
GRACE_SECONDS = 5  # how long a failing process 0 lets the others report the same error
SHARED_SECONDS = 20.0  # network disks may show a new file this late
SILENT_SECONDS = 10  # of a process that waits for process 0, before it says so
ARGUMENTS = ("coordinator", "num_processes", "process_id")
# What JAX reads besides the numbers, by its name of the launcher.
NEEDED = {
    "slurm": ("SLURM_JOB_ID", "SLURM_LOCALID"),
    "ompi": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say where the other processes are."""
    group = parser.add_argument_group(
        "several processes", "not needed on TPU pods, under Slurm and Open MPI"
    )
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="process 0's host, and a free port")
    add("--num-processes", type=int, metavar="N", help="how many processes there are")
    add("--process-id", type=int, metavar="I", help="number of this process, from 0")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses an incomplete or impossible description of the processes.

    Raises:
      ValueError: says what is missing or out of range.
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


class Launch(NamedTuple):
    """How the processes of a run were started.

    Attributes:
      method: JAX's name of the launcher that it asks where process 0 is; None: it looks
        for one; "deactivate": there is none.
      processes: how many there are; None if only JAX can tell.
      process: number of this one.
      said: what says so, such as "SLURM_NTASKS=4".
      alone: what to do to run only this process.
    """

    method: str | None
    processes: int | None
    process: int | None
    said: str
    alone: str


def launched(environ: Mapping[str, str]) -> Launch | None:
    """The launcher that started this and other processes, None if it runs alone.

    The variables of a launcher are inherited by shells, IDEs and whatever they start:
    only a process with a number is one of several.

    Raises:
      ValueError: this is one of several, but JAX cannot find the others.
    """
    # The job's number of tasks is not that of the step: `salloc` opens a shell in a
    # step of one task.
    step = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else ""
    asked = (
        ("slurm", step or "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
        ("ompi", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", ""),
        ("", "PMI_SIZE", "PMI_RANK", ""),  # MPICH and its kin, unknown to JAX
    )
    for method, size, rank, step in asked:
        processes, process = (_number(environ.get(name)) for name in (size, rank))
        if processes is None or processes < 2 or (step and step not in environ):
            continue
        said = f"{size}={processes}"
        lacking = [name for name in NEEDED.get(method, ()) if name not in environ]
        if process is None or (method == "slurm" and lacking):
            missing = rank if process is None else lacking[0]
            cli.warn(f"{said} but no {missing}: not one of several, runs alone")
            continue
        if lacking or not method:
            raise ValueError(
                f"{said}, but nothing tells JAX where process 0 is: add --coordinator="
                f"HOST:PORT --num-processes={processes} --process-id={process}, or to "
                f"run alone unset {rank}"
            )
        return Launch(method, processes, process, said, f"unset {rank}")
    on_tpu = any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    if on_tpu and importlib.util.find_spec("libtpu"):
        return Launch(None, None, None, "the TPU's metadata", "set JAX_PLATFORMS=cpu")
    return None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


@dataclasses.dataclass
class Cluster:
    """All processes of a run, as seen by one of them; made by `start`.

    Use as a context manager. At the end of the block the processes wait for each other
    and disconnect. An exception leaves at once; JAX then ends the other processes.

    Attributes:
      process: number of this process.
      processes: how many there are.
    """

    process: int = 0
    processes: int = 1

    @property
    def is_first(self) -> bool:
        """True for process 0, the only one that writes and prints."""
        return self.process == 0

    def say(self, *parts: Any) -> None:
        """Prints, on process 0 only."""
        if self.is_first:
            print(*parts, flush=True)

    def from_first(self, tree: Any) -> Any:
        """Returns process 0's arrays, bit for bit; all processes pass equal shapes."""
        if self.processes == 1:
            return tree
        arrays = jax.tree.map(np.asarray, tree)
        # As bytes: the sum by which JAX broadcasts would turn -0 into 0.
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

    def gather(self, yes: bool) -> list[bool]:
        """Returns every process's answer, by number; waits for all of them."""
        if self.processes == 1:
            return [yes]
        answers = multihost_utils.process_allgather(np.array([yes]))
        return [bool(answer) for answer in np.ravel(answers)]

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.gather(True)

    def in_first(self, call: Callable[[], None]) -> None:
        """Calls in process 0 only; its error ends all processes, with a line each.

        Raises:
          What the call raises, or ValueError in the other processes.
        """
        problem: Exception | None = None
        try:
            if self.is_first:
                call()
        except cli.USER_ERRORS as error:
            problem = error
        if any(self.gather(problem is not None)):
            raise problem or ValueError("process 0 cannot start, and says why")

    def check_same(self, what: str, text: str) -> None:
        """Refuses processes that were started differently.

        Raises:
          ValueError: in all processes, if `text` differs between them.
        """
        content = text.encode(errors="surrogatepass")  # names that are not UTF-8
        digest = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
        if not all(self.gather(np.array_equal(self.from_first(digest), digest))):
            raise ValueError(
                f"the {self.processes} processes were started with different {what}: "
                "give all of them the same"
            )

    def check_shared(self, folder: AnyPath, within: float = SHARED_SECONDS) -> None:
        """Refuses a workdir that is not one folder for all processes.

        Without a shared disk each machine would find an empty folder of its own.

        Args:
          folder: the workdir, as this process was told.
          within: seconds to look for a file that process 0 writes there.

        Raises:
          ValueError: in all processes, if one of them cannot see that file.
        """
        if self.processes == 1:
            return
        token = random.SystemRandom().getrandbits(30)
        if self.is_first:
            try:
                (folder / f".shared.{token}").write_text("")
            except OSError:
                token = -1  # nobody can see the file, and nobody waits for it
        token = int(self.from_first(np.array(token)))
        file = folder / f".shared.{token}"
        seen = self.gather(token >= 0 and _appears(file, within))
        if self.is_first and token >= 0:
            file.unlink()
        blind = [str(number) for number, saw in enumerate(seen) if not saw]
        if blind:
            raise ValueError(
                f"--workdir={folder} is not one folder for all {len(seen)} processes: "
                f"{', '.join(blind)} cannot see what 0 writes there; put it on a disk "
                "that all of them share, or into a bucket (gs://)"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.processes == 1:
            return
        if error is None:
            self.barrier()
            jax.distributed.shutdown()
        elif isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a collective failed because a process died. JAX's heartbeat
            # finds that out and ends this process; any other error shows afterwards.
            time.sleep(2 * HEARTBEAT_SECONDS)
        elif isinstance(error, Exception) and self.is_first:
            time.sleep(GRACE_SECONDS)  # JAX aborts the others when process 0 is gone


def start(args: argparse.Namespace) -> Cluster:
    """Connects this process to the others of its run, if there are others.

    Call before JAX computes anything.

    Args:
      args: parsed by a parser that `add_arguments` extended.

    Raises:
      ValueError: the arguments contradict each other.
      OSError: the other processes cannot be reached.
    """
    check_arguments(args)
    if args.coordinator:
        numbers = args.num_processes, args.process_id
        said = f"--num-processes={numbers[0]}"
        launch = Launch("deactivate", *numbers, said, "leave out --coordinator")
    elif (found := launched(os.environ)) is None:
        return Cluster()
    else:
        launch = found
    if args.coordinator and args.process_id:
        _wait_for_coordinator(args.coordinator)
    # SIGTERM is ours: all processes agree on a stop by `Vote`.
    jax.config.update("jax_enable_preemption_service", False)
    _connect(launch, args.coordinator)
    try:
        return Cluster(jax.process_index(), jax.process_count())
    except RuntimeError as error:
        raise OSError(f"the other processes cannot be reached: {error}") from None


def _connect(launch: Launch, coordinator: str | None) -> None:
    """Lets JAX find the other processes, in a thread of its own.

    While JAX waits, a main thread would hear no signal, and at the end of its patience
    JAX aborts the process instead of raising.
    """
    problems: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                launch.processes,
                launch.process,
                cluster_detection_method=launch.method,
                initialization_timeout=2 * CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except Exception as error:  # raised below
            problems.append(error)

    thread = threading.Thread(target=initialize, name="connect", daemon=True)
    thread.start()
    count = "all" if launch.processes is None else str(launch.processes - 1)
    others = f"{count} other process{'es' * (count != '1')} ({launch.said})"
    if launch.process or launch.processes is None:
        thread.join(SILENT_SECONDS)
    if thread.is_alive():
        print(
            f"waiting for {others}, up to {CONNECT_SECONDS} s; to run alone, "
            f"{launch.alone}",
            file=sys.stderr,
            flush=True,
        )
        thread.join(CONNECT_SECONDS)
    if thread.is_alive():
        raise OSError(
            f"{others} not found within {CONNECT_SECONDS} s: start all of them, or to "
            f"run alone, {launch.alone}"
        )
    for error in problems:
        if not isinstance(error, RuntimeError):
            raise error
        raise OSError(f"the other processes cannot be reached: {error}") from None


def _wait_for_coordinator(address: str) -> None:
    """Waits until process 0 listens; JAX itself would abort instead of raising."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise OSError(
                    f"--coordinator={address} cannot be reached: {error}; process 0 "
                    "must run there and the port must be open"
                ) from None
            time.sleep(0.5)


def _appears(file: AnyPath, within: float) -> bool:
    deadline = time.monotonic() + within
    while True:
        with suppress(OSError):
            # Listed, not opened: a network disk may remember that it did not exist.
            if file.name in {path.name for path in file.parent.iterdir()}:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(0.5, within / 10))


class Vote:
    """Asks with every step if any process wants to stop; the answer is read later.

    All processes read the same answer after the same step, so they stop together. The
    vote is a tiny computation beside the step, and nothing waits for it.

    Args:
      cluster: the processes.
      devices: those of the step, of all processes.
    """

    def __init__(self, cluster: Cluster, devices: Sequence[jax.Device]):
        self._alone = cluster.processes == 1
        mesh = Mesh(np.array(devices), "devices")
        self._each = NamedSharding(mesh, PartitionSpec("devices"))
        self._own = len(mesh.local_devices)
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, stop: bool) -> bool | jax.Array:
        """Casts this process's vote; `bool` of the result waits for the answer."""
        if self._alone:
            return stop
        own = np.full(self._own, stop)
        return self._any(jax.make_array_from_process_local_data(self._each, own))
