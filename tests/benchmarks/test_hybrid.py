"""hybrid.py: how many photographs each start needs, on a small planted model."""

import json

import pytest

from benchmarks import hybrid


def curve(start, seed, *patches):
    """Rows after 0, 1, 2, … photographs with so many defective patches."""
    return [
        {"seed": seed, "start": start, "photographs": i, "defective": each}
        for i, each in enumerate(patches)
    ]


@pytest.mark.parametrize(
    ("patches", "photographs"),
    [
        ((10, 5, 1, 0), 2),  # a tenth is enough
        ((10, 5, 1.1, 1.1), None),
        ((10, 1, 2, 1), 3),  # what comes back was not gone
        ((10, 10, 10, 10), None),
    ],
)
def test_the_photographs_needed_leave_a_tenth_for_good(patches, photographs):
    assert hybrid.needed(curve("planted", 0, *patches)) == {"planted": {0: photographs}}


def test_every_start_is_compared_with_the_planted_model():
    rows = curve("planted", 3, 10, 9, 8) + curve("data-free", 3, 2, 1, 1)
    assert hybrid.needed(rows) == {"planted": {3: None}, "data-free": {3: 1}}


@pytest.mark.slow  # compiles a repair and a data-free one
def test_a_data_free_start_needs_no_photograph(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert hybrid.main(["--seeds=1", "--images=1", f"--out={out}"]) == 0
    assert '"data-free": {\n  "0": 0\n }' in capsys.readouterr().out
    rows = json.loads(out.read_text())
    starts = ("planted", "data-free", "half of it")
    assert [(row["start"], row["photographs"]) for row in rows] == [
        (start, count) for start in starts for count in (0, 1)
    ]
    left = {(row["start"], row["photographs"]): row["defective"] for row in rows}
    assert left["planted", 0] == 7 and left["data-free", 0] == 0
    assert left["half of it", 0] > 6


def test_runs_without_their_truth_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        hybrid.main([f"--runs={tmp_path}"])
    assert "--runs and --truth go together" in capsys.readouterr().err
