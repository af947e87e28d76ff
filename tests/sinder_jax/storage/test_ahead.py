import threading

import pytest

from sinder_jax.storage.ahead import ahead


def test_results_come_in_order():
    assert list(ahead(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
    assert list(ahead(abs, [])) == []


def test_the_next_call_runs_while_a_result_is_used_and_no_more():
    started = {x: threading.Event() for x in range(4)}

    def call(x):
        started[x].set()
        return x

    results = ahead(call, range(4))
    assert next(results) == 0
    assert started[1].wait(timeout=60)  # without being asked for
    assert not started[2].wait(timeout=0.05)  # at most one ahead
    assert list(results) == [1, 2, 3]


def test_an_error_is_raised_where_its_result_is_due():
    results = ahead(lambda x: 1 // x, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
