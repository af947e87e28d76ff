"""benchmarks/faults/double_starts.py: the real processes, a few times each."""

import subprocess
import sys

import pytest

import places


@pytest.mark.slow
def test_of_two_runs_one_goes_on_and_a_woken_one_writes_nothing():
    command = [sys.executable, "-m", "benchmarks.faults.double_starts"]
    command += ["--starts=3", "--resumes=1", "--pauses=2"]
    done = subprocess.run(command, cwd=places.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()[-3:]
    assert told == [
        "2 x pause: the woken run wrote nothing and ended in one line with exit code 2",
        "1 x resume: one went on, with the files of a lone run",
        "2 x start: one went on, with the files of a lone run",
    ]
