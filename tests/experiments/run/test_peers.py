"""experiments/peers.py: three processes' watches, in the threads of this one."""

import queue
import socket
import subprocess
import sys
import threading
import time

import pytest

from experiments.run.peers import HELLO, Meeting, Peers


class Group:
    """Watches of `count` processes that tell what they report."""

    def __init__(self, count, **options):
        self.meetings = [queue.Queue() for _ in range(count)]
        self.reports = queue.Queue()
        self.peers = [None] * count
        self.options = {"interval": 0.05, "patience": 1.0, "grace": 0.1, **options}
        threads = [
            threading.Thread(target=self.open, args=(each,)) for each in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert all(self.peers)

    def open(self, process):
        def exchange(meeting):
            if process == 0:
                for other in self.meetings[1:]:
                    other.put(meeting)
                return meeting
            return self.meetings[process].get(timeout=10)

        self.peers[process] = Peers(
            process,
            len(self.peers),
            "127.0.0.1",
            exchange,
            lambda line: self.reports.put((process, line)),
            **self.options,
        )

    def die(self, process):
        """As the system closes the connections of a dead process."""
        peers = self.peers[process]
        peers._closing.set()  # its thread ends, and says nothing more
        peers._tell = lambda *_: None
        peers._thread.join()
        for connection, _ in peers._connections():
            connection.close()

    def drop(self):
        """Ends all threads and closes what is still open."""
        for peers in self.peers:
            peers._closing.set()
            peers._thread.join(10)
            for connection, _ in peers._connections():
                connection.close()

    def reported(self, count):
        return dict(self.reports.get(timeout=10) for _ in range(count))

    def close(self):
        threads = [threading.Thread(target=each.close) for each in self.peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def group():
    """Makes a group; its sockets are closed at the end."""
    made = []

    def make(count, **options):
        made.append(Group(count, **options))
        return made[-1]

    yield make
    for each in made:
        each.drop()


def test_nobody_reports_a_run_that_ends_well(group):
    run = group(3)
    time.sleep(0.5)
    run.close()
    assert run.reports.empty()


@pytest.mark.parametrize("gone", [1, 2])
def test_all_others_hear_of_a_dead_process(gone, group):
    run = group(3)
    run.die(gone)
    reports = run.reported(2)
    assert set(reports) == {0, 3 - gone}
    for line in reports.values():
        assert (
            line.startswith(f"process {gone} of this run is gone") and "\n" not in line
        )


def test_all_hear_of_the_first_process(group):
    run = group(3)
    run.die(0)
    reports = run.reported(2)
    assert set(reports) == {1, 2}
    for line in reports.values():
        assert line.startswith("process 0 of this run is gone (its connection closed)")


def test_a_silent_process_is_dead_after_a_while(group):
    run = group(2)
    run.peers[1]._tell = lambda *_: None  # its connection stays open
    began = time.monotonic()
    report = run.reported(2)  # process 1 hears of itself, should it wake up
    assert 0.5 <= time.monotonic() - began < 8
    assert "process 1 of this run is gone (silent for 1 seconds)" in report[0]


def test_who_meets_the_same_error_ends_by_it_and_reports_nobody(group):
    run = group(3, grace=2.0)
    failing = [
        threading.Thread(target=run.peers[process].fail) for process in (1, 0, 2)
    ]
    for thread in failing:
        thread.start()
        time.sleep(0.2)
    for thread in failing:
        thread.join(10)
    assert run.reports.empty()


def test_an_error_of_one_alone_ends_the_others_after_a_while(group):
    run = group(3, grace=0.5)
    began = time.monotonic()
    run.peers[1].fail()
    reports = run.reported(2)
    assert time.monotonic() - began >= 0.4 and set(reports) == {0, 2}
    for line in reports.values():
        assert line.startswith("process 1 of this run is gone")


def test_abort_becomes_one_line_and_an_exit_code():
    program = (
        "import ctypes, threading, time\n"
        "from experiments.run import peers\n"
        "peers.end_instead_of_abort('process 0 is gone', 75)\n"
        "threading.Thread(target=ctypes.CDLL(None).abort).start()\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 75
    assert ended.stderr == "error: process 0 is gone\n"


def test_a_stranger_is_not_taken_for_a_process():
    meetings = queue.Queue()
    reports = []

    def first():
        def exchange(meeting):
            meetings.put(meeting)
            meetings.put(meeting)
            return meeting

        opened.put(Peers(0, 2, "", exchange, reports.append, interval=0.05))

    opened = queue.Queue()
    thread = threading.Thread(target=first)
    thread.start()
    meeting = meetings.get(timeout=10)
    with socket.create_connection(("127.0.0.1", meeting.port)) as stranger:
        stranger.sendall(HELLO.pack(bytes(16), 1))
        assert stranger.recv(1) == b""  # hung up on
    assert opened.empty()
    other = Peers(
        1, 2, "127.0.0.1", lambda _: meetings.get(), reports.append, interval=0.05
    )
    thread.join(10)
    for each in (opened.get(timeout=1), other):
        closing = threading.Thread(target=each.close)
        closing.start()
    closing.join(10)
    assert reports == [] and meeting.token != Meeting().token
