"""Starts a command with Ctrl-C enabled: a shell in the background may ignore it.

python interruptible.py COMMAND [ARGUMENT...]
"""

import os
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
