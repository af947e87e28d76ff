"""Word from the other processes of a run, so that none waits for a dead one for ever.

    process 0 <--one TCP connection each--> the others:  alive, alive, ..., bye

A process that dies closes its connection at once; a host that is lost says nothing, and
counts as dead after `patience` seconds. Whoever notices ends: the collectives of a step
would wait for the dead process, on some hardware without end.
"""

import ctypes
import dataclasses
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from sinder_jax import cli

INTERVAL = 2.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one until a process counts as dead
GRACE = 2.0  # seconds for the others, where one ends by an error that it has told
TOKEN_BYTES = 16
HELLO = struct.Struct(f">{TOKEN_BYTES}sI")
ALIVE, BYE, FAILED, GONE = b".", b"b", b"f", b"g"
MESSAGE = struct.Struct(">cI")  # kind, and for GONE which process


@dataclasses.dataclass
class Meeting:
    """Where process 0 listens, as it tells the others.

    Attributes:
      port: of TCP.
      token: what a process must say to be heard, so that no stranger is.
    """

    port: int = 0
    token: bytes = bytes(TOKEN_BYTES)


@dataclasses.dataclass
class _Peer:
    process: int
    heard: float  # time.monotonic()
    said_bye: bool = False
    failed: bool = False
    partial: bytes = b""


def gone(process: int, how: str) -> str:
    """The one line for a process that died."""
    return (
        f"process {process} of this run is gone ({how}); its own output says why. "
        "Start all processes again: the run goes on from its last saved state"
    )


def end_instead_of_abort(line: str, code: int) -> None:
    """Ends this process by `end` where C++ code calls abort().

    JAX's does when it misses process 0. The thread that watches is nearly always first.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _handlers.append(kind(lambda number: end(line, code)))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])


_handlers: list[Any] = []  # C code holds them: they must not be collected


def end(line: str, code: int) -> None:
    """Says why and ends this process at once, whatever its threads wait for."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


class Peers:
    """Connections to the other processes, watched by a thread.

    Args:
      process: number of this process.
      processes: how many there are, at least 2.
      host: address of process 0.
      exchange: gives every process what process 0 passes in, see `Meeting`.
      gone: called in the watching thread with one line when a process is dead.
      interval, patience, grace: seconds, see the constants.

    Raises:
      OSError: process 0 cannot be reached.
    """

    def __init__(
        self,
        process: int,
        processes: int,
        host: str,
        exchange: Callable[[Meeting], Meeting],
        gone: Callable[[str], None] = lambda line: end(line, cli.TRY_AGAIN),
        *,
        interval: float = INTERVAL,
        patience: float = PATIENCE,
        grace: float = GRACE,
    ):
        self._process, self._gone = process, gone
        self._interval, self._patience = interval, patience
        self._grace = grace
        self._selector = selectors.DefaultSelector()
        self._closing = threading.Event()
        self._takes_leave = False
        self._all_said_bye = threading.Event()
        if process == 0:
            with socket.create_server(("", 0), backlog=processes) as server:
                meeting = Meeting(server.getsockname()[1], os.urandom(TOKEN_BYTES))
                exchange(meeting)
                self._accept(server, meeting, processes - 1)
        else:
            meeting = exchange(Meeting())
            connection = socket.create_connection(
                (host, meeting.port), timeout=patience
            )
            connection.sendall(HELLO.pack(meeting.token, process))
            self._add(connection, 0)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def fail(self) -> None:
        """Tells the others that an error ends this process, which they may meet, too.

        Each then ends by its own. Process 0 waits for that: JAX ends the others by a
        signal once it is gone.
        """
        self._closing.set()
        self._thread.join()
        self._tell(FAILED)
        if self._process == 0:
            time.sleep(self._grace)

    def close(self) -> None:
        """Takes leave; process 0 waits until all others did, so that it ends last."""
        if self._process == 0:
            self._all_said_bye.wait(self._patience)
        self._takes_leave = True
        self._closing.set()
        self._thread.join()
        for connection, _ in self._connections():
            connection.close()
        self._selector.close()

    # --- Connections ----------------------------------------------------------------

    def _accept(self, server: socket.socket, meeting: Meeting, others: int) -> None:
        server.settimeout(self._patience)
        waiting = others
        while waiting:
            connection, _ = server.accept()
            connection.settimeout(self._patience)
            hello = connection.recv(HELLO.size, socket.MSG_WAITALL)
            if len(hello) == HELLO.size and hello.startswith(meeting.token):
                self._add(connection, HELLO.unpack(hello)[1])
                waiting -= 1
            else:
                connection.close()  # a stranger

    def _add(self, connection: socket.socket, process: int) -> None:
        connection.settimeout(self._patience)
        peer = _Peer(process, time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _connections(self) -> list[tuple[socket.socket, _Peer]]:
        open_ones = self._selector.get_map() or {}  # None once it is closed
        return [(key.fileobj, key.data) for key in open_ones.values()]  # type: ignore[misc]

    # --- The watching thread --------------------------------------------------------

    def _watch(self) -> None:
        said = 0.0
        while not self._closing.is_set():
            for key, _ in self._selector.select(min(self._interval, 0.2)):
                self._receive(key.fileobj, key.data)  # type: ignore[arg-type]
            if time.monotonic() - said >= self._interval:
                said = time.monotonic()
                self._tell(ALIVE)
            for _, peer in self._connections():
                silent = time.monotonic() - peer.heard
                if not peer.said_bye and silent > self._patience:
                    self._report(peer.process, f"silent for {silent:.0f} seconds")
            if all(peer.said_bye for _, peer in self._connections()):
                self._all_said_bye.set()
        if self._takes_leave:
            self._tell(BYE)

    def _receive(self, connection: socket.socket, peer: _Peer) -> None:
        try:
            received = connection.recv(4096)
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(connection)
            connection.close()
            if not peer.said_bye and not self._closing.is_set():
                self._report(peer.process, "its connection closed", failed=peer.failed)
            return
        peer.heard = time.monotonic()
        peer.partial += received
        while len(peer.partial) >= MESSAGE.size:
            kind, process = MESSAGE.unpack(peer.partial[: MESSAGE.size])
            peer.partial = peer.partial[MESSAGE.size :]
            peer.said_bye |= kind == BYE
            peer.failed |= kind == FAILED
            if kind == FAILED:
                self._report(peer.process, "by an error", failed=True)
            if kind == GONE:
                self._report(process, "as process 0 says", failed=peer.failed)

    def _tell(self, kind: bytes, process: int = 0) -> None:
        for connection, peer in self._connections():
            try:
                connection.sendall(MESSAGE.pack(kind, process))
            except OSError:  # found by the next read
                peer.heard = min(peer.heard, time.monotonic())

    def _report(self, process: int, how: str, *, failed: bool = False) -> None:
        if failed and self._closing.wait(self._grace):
            return  # by the same error, which this process tells itself
        if self._process == 0:
            self._tell(GONE, process)
        self._gone(gone(process, how))
