"""Converts each file given; prints exit code, error and growth of the peak memory.

python measured_conversions.py FILE ...    one line of JSON per file; Linux only
"""

import json
import sys
import traceback
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch  # noqa: F401  imported here so that it does not count

from convert.__main__ import main
from convert.commands import to_jax  # noqa: F401  likewise


def peak() -> int:
    """Largest resident memory since the peak was last cleared, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = peak()
    with redirect_stderr(StringIO()) as error:
        try:
            code: int | str = main(["to-jax", str(path), str(path.parent / "dst")])
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([code, error.getvalue(), 1024 * (peak() - before)]), flush=True)
