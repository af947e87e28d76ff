"""Competitors timed in turn, A B A B ..., and compared by their medians."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Numbers = dict[str, Any]


def in_turn(rounds: int, **calls: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each call, by name, in `rounds` rounds after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for count in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if count:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def tell(name: str, numbers: Numbers) -> None:
    """Prints a part of a benchmark on stderr as soon as it is measured."""
    print(json.dumps({name: numbers}), file=sys.stderr, flush=True)


def summary(seconds: dict[str, list[float]], baseline: str) -> Numbers:
    """Medians, and how many times as fast as the baseline each call is."""
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    return {
        "seconds": medians,
        "all seconds": seconds,
        f"times faster than {baseline}": {
            name: medians[baseline] / median
            for name, median in medians.items()
            if name != baseline
        },
    }
