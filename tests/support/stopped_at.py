"""The main job, which sends itself SIGTERM when a step takes a given image.

python stopped_at.py IMAGE [ARGUMENT of experiments.repair...]     # IMAGE -1: never
"""

import os
import signal
import sys

from experiments import repair
from sinder_jax import launch

step = repair.Runner.step
sent = []


def interrupted(self, batch):
    if int(sys.argv[1]) in batch.positions and not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch)


if __name__ == "__main__":
    repair.Runner.step = interrupted
    launch.exit_on_error(lambda: repair.main(sys.argv[2:]))
