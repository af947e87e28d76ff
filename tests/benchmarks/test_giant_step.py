"""benchmarks/giant_step.py: the step that is timed runs through all blocks."""

import json

import numpy as np
import pytest

from benchmarks import giant_step


@pytest.mark.slow
def test_benchmark_of_a_whole_step_reaches_the_last_block(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["giant_step", "--model=dinov2_vits14"])
    giant_step.main()
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["layer"] == 11 and numbers["outliers"] >= 3
    assert np.isfinite(numbers["loss"])
