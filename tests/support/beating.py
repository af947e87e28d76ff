"""Keeps the heartbeat of the workdir given as argument for a minute, like a run."""

import sys
import time
from pathlib import Path

from experiments.run.heartbeat import Heartbeat

if __name__ == "__main__":
    with Heartbeat(Path(sys.argv[1])) as alive:
        alive.phase("repairing")
        time.sleep(60)
