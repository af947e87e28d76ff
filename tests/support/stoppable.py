"""A program that makes a file, waits for a signal, and writes which one came.

python stoppable.py READY [STOPPED]     # without STOPPED it handles no signal
"""

import pathlib
import signal
import sys
import time


def stop(number, frame):
    pathlib.Path(sys.argv[2]).write_text(signal.Signals(number).name)
    sys.exit(75)


if sys.argv[2:]:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
