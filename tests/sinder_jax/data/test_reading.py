import pytest

from samples import error_of
from sinder_jax.data import reading


def square(i):
    if i == 7:
        raise ValueError("seven")
    return i * i


@pytest.mark.parametrize("num_threads", [0, 3])
def test_examples_come_in_order_from_start_to_stop(num_threads):
    found = reading.read_ahead(
        square, list, 2, start=1, stop=6, num_threads=num_threads
    )
    assert list(found) == [[1, 4], [9, 16], [25]]


def test_nothing_is_read_from_an_empty_range():
    assert list(reading.read_ahead(square, list, 2, start=3, stop=3)) == []


def test_an_error_is_raised_with_its_batch():
    found = reading.read_ahead(square, list, 2, start=4, num_threads=2)
    assert next(found) == [16, 25]
    assert "seven" in error_of(next, found)
