"""sinder_jax/cores.py: results in order, and an end to what was interrupted."""

import os
import threading

import pytest

from sinder_jax import cores


def test_results_come_in_the_order_of_the_jobs_with_their_progress():
    told = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    results = cores.in_parallel(lambda job: job * job, range(5), progress)
    assert list(results) == [0, 1, 4, 9, 16]
    assert told == [(done, 5) for done in range(1, 6)]


def test_an_error_of_a_job_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(cores.in_parallel(lambda job: 1 / job, [1, 0, 2]))


def test_jobs_that_have_not_begun_when_it_is_interrupted_are_left_out():
    """As by a signal that stops a run while its kernels are factorized."""
    begun, go_on = [], threading.Event()
    workers = min(os.cpu_count() or 1, cores.MOST_AT_ONCE)

    def work(job):
        begun.append(job)
        if job:
            go_on.wait(0.2)

    results = cores.in_parallel(work, range(20 * workers))
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert len(begun) <= 3 * workers
