"""remedies.py: the table over seeds; the demo's model, repaired and measured."""

import json

import pytest

import photos
from benchmarks import remedies


def test_a_cell_is_the_mean_and_the_range_unless_all_are_alike():
    told = [
        {"nothing": {"mending": 0.0, "seconds": 20.0, "damage": 0.5}},
        {"nothing": {"mending": 0.0, "seconds": 40.06, "damage": None}},
    ]
    assert remedies.table(told).splitlines() == [
        "| remedy | mending | seconds | damage |",
        "| --- | --- | --- | --- |",
        "| nothing | 0 | 30.0 (20.0 to 40.1) | – |",
    ]


@pytest.mark.slow  # a repair of the demo's model, and a data-free one
def test_every_remedy_of_the_demos_model_has_a_row(tmp_path, capsys):
    for i in range(3):
        photos.save_noise(tmp_path / f"data/{i}.png", 240, 240, seed=i)
    out = tmp_path / "out"
    given = [f"--data={tmp_path / 'data'}", "--seeds=1", "--config.resamples=0"]
    assert remedies.main([f"--out={out}", "--gamma=4", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    applied = ["ablation", "data-free", "test-time registers", "clamping"]
    assert names == [f"| {x}" for x in ("remedy", "---", "nothing", *applied, "SINDER")]
    rows = json.loads((out / "meter0" / "results.json").read_text())
    found = {row.get("remedy", row["checkpoint"]): row["metrics"] for row in rows}
    assert found["data-free"]["mending"] == 1
    assert found["data-free"]["truth, thrown"] > 0.9
    assert rows[-1]["evaluated"]["images its repair passed"] > 20


def test_runs_without_their_truth_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        remedies.main([f"--out={tmp_path}", "--data=sample", f"--runs={tmp_path}"])
    assert "--runs and --truth go together" in capsys.readouterr().err
