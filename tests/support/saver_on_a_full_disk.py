"""Fails to save a snapshot, then goes on: saver_on_a_full_disk.py DIR.

A limit on the size of files stands for a full disk: the same call fails.
"""

import resource
import sys
import time

from numbered import tree
from sinder_jax.storage.snapshots import Snapshots

kept = Snapshots(sys.argv[1])
kept.save(1, tree(1))
kept.wait()
unlimited = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, unlimited))  # an array has 12,000
began = time.monotonic()
kept.save(2, tree(2))
while time.monotonic() < began + 10:
    time.sleep(0.01)
    try:
        kept.check()
    except OSError as error:
        told = str(error)
        break
else:
    raise SystemExit("no error within ten seconds")
assert int(kept.load_newest().tree["num_images"]) == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
kept.save(3, tree(3))
kept.save(4, tree(4))
assert int(kept.load_newest().tree["num_images"]) == 4
kept.close()
print(told)
