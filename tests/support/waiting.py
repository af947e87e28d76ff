"""Waiting for what another thread or process does."""

import time


def until(condition):
    """Waits for the thread; ten seconds are much more than it needs."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "nothing was written"
        time.sleep(0.01)
