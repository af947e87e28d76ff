"""A program for tests of signals: reads a folder with two workers until Ctrl-C.

    python reader.py FOLDER

Prints the process ids of the workers, and at the end the workers that are left.
"""

import json
import multiprocessing
import signal
import sys
import time

from sinder_jax import families
from sinder_jax.data import batches, listing

if __name__ == "__main__":
    stops: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))
    family = families.named("dinov2")
    stream = batches.stream(
        listing.open_photographs(sys.argv[1]),
        2 * family.patch_size,
        patch_size=family.patch_size,
        statistics=family.statistics,
        num_workers=2,
    )
    next(stream)
    print(json.dumps([p.pid for p in multiprocessing.active_children()]), flush=True)
    while not stops:
        next(stream)
        time.sleep(0.01)
    for _ in range(30):  # more than what was read ahead
        next(stream)
    stream.close()
    print("closed", multiprocessing.active_children(), flush=True)
