"""A program that ends with the next of several exit codes each time it is started.

python exits.py COUNTER 75,134,0     # COUNTER grows by one byte per start
"""

import pathlib
import sys

counter, codes = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
starts = len(counter.read_text()) if counter.exists() else 0
counter.write_text("x" * (starts + 1))
sys.exit(int(codes[starts]))
