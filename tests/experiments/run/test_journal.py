"""run/journal.py: what is counted of a run."""

import dataclasses
import json

from experiments.run.journal import NAMED, Counts
from rows import row

UNREADABLE = dict.fromkeys(("layer", "loss", "alpha", "num_outliers", "finite"))
ROWS = [
    row(0),
    row(1, layer=-1, loss=None),
    row(2, readable=False, file="b.jpg", **UNREADABLE),
    row(3, readable=False, file="a.jpg", **UNREADABLE),
    row(4, finite=False, loss=None, file="c.jpg"),
    row(5, readable=False, file="b.jpg", **UNREADABLE),
    row(6, skipped=0.5),
]
COUNTS = Counts(
    images=7,
    images_with_defect=3,
    images_not_finite=1,
    images_unreadable=3,
    files_not_finite=["c.jpg"],
    unreadable_files=["a.jpg", "b.jpg"],
    share_of_last_images_without_defect=0.5,
)


def test_rows_are_counted():
    counts = Counts()
    for each in ROWS:
        counts.add(each)
    assert counts == COUNTS


def test_counts_go_on_from_those_of_a_state():
    """Its metadata is JSON; what metrics.jsonl holds by then does not matter."""
    first = Counts()
    for each in ROWS[:4]:
        first.add(each)
    metadata = json.loads(json.dumps({"counts": dataclasses.asdict(first)}))
    counts = Counts(**metadata["counts"])
    for each in ROWS[4:]:
        counts.add(each)
    assert counts == COUNTS


def test_not_more_than_a_thousand_files_are_named():
    counts = Counts()
    for i in range(NAMED + 5):
        counts.add(row(i, readable=False, **UNREADABLE))
    assert counts.images_unreadable == NAMED + 5
    assert len(counts.unreadable_files) == NAMED
