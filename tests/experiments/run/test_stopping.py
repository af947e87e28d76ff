"""run/stopping.py: what signals do to a run, before its steps and within."""

import os
import signal

import pytest

from experiments.run.stopping import Stopped, Stopping


def send(number):
    os.kill(os.getpid(), number)
    signal.getsignal(number)  # Python runs handlers between two of its own steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_what_comes_before_the_steps(number):
    with Stopping() as stopping, pytest.raises(Stopped, match=number.name):
        send(number)
    assert stopping.asked == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_within_the_steps_it_waits_for_the_loop(number):
    with Stopping() as stopping:
        stopping.finish_steps()
        assert stopping.asked is None
        send(number)
        assert stopping.asked == number.name
        send(signal.SIGTERM)  # batch systems repeat theirs


def test_a_second_interrupt_stops_at_once():
    with Stopping() as stopping:
        stopping.finish_steps()
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_was_asked_during_the_last_step_stops_after_it():
    with Stopping() as stopping:
        stopping.finish_steps()
        send(signal.SIGTERM)
        with pytest.raises(Stopped):
            stopping.finish_steps(False)


def test_the_handlers_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stopping():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert after == before
