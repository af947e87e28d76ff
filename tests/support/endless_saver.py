"""Saves snapshots one after the other until it is killed: endless_saver.py DIR."""

import sys

from numbered import tree
from sinder_jax.storage.snapshots import Snapshots

kept = Snapshots(sys.argv[1])
newest = kept.load_newest()
assert newest is None or not newest.damaged, newest
number = 0 if newest is None else int(newest.tree["num_images"])
print("from", number, flush=True)
while True:
    number += 1
    kept.save(number, tree(number))  # waits for the save before
    print("saved", number - 1, flush=True)
