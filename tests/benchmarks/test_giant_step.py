"""benchmarks/giant_step.py: the step that is timed runs through all blocks."""

import json

import pytest

from benchmarks import giant_step


@pytest.mark.slow
def test_both_steps_reach_the_block_and_agree(monkeypatch, capsys):
    pytest.importorskip("torch")
    arguments = ["--model=dinov2_vits14", "--size=224", "--blocks=11", "--steps=1"]
    monkeypatch.setattr("sys.argv", ["giant_step", *arguments, "--authors"])
    giant_step.main()
    _, ours, authors = map(json.loads, capsys.readouterr().out.splitlines())
    assert ours["block"] == authors["block"] == 11 and ours["outliers"] >= 3
    assert ours["first loss"] == pytest.approx(authors["first loss"], rel=1e-4)
    assert ours["GFLOP"] < authors["GFLOP"]
