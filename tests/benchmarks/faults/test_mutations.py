"""benchmarks/faults/mutations.py: mutated input is taken rightly or refused."""

import collections
import os
import sys

import pytest

import places
from benchmarks.faults import mutations

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.parametrize(
    "kind, count",
    [
        ("safetensors", 20),
        ("pth", 20),
        pytest.param("images", 8, marks=pytest.mark.slow),
    ],
)
def test_mutated_inputs_are_right_or_refused(kind, count):
    pytest.importorskip("torch")
    outcomes = mutations.run(kind, count=count)
    assert len(outcomes) == count
    failed = [each for each in outcomes if each.verdict not in mutations.ACCEPTED]
    assert not failed


@linux
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, of good pixels
@pytest.mark.parametrize("kind", ["safetensors", "pth", "images", "config"])
def test_more_mutated_inputs_are_right_or_refused(kind, capsys):
    pytest.importorskip("torch")
    outcomes = mutations.run(kind, seed=1, count=30 if kind == "config" else 100)
    with capsys.disabled():
        print(f"\n{kind}: {collections.Counter(x.verdict for x in outcomes)}")
    assert not [x for x in outcomes if x.verdict not in mutations.ACCEPTED]


@linux
def test_every_way_to_fail_is_seen(monkeypatch):
    """The negative control: a program that misbehaves on purpose."""
    ends = "refused traceback silent memory hang crash right wrong".split()

    def trials(folder, rng):
        for end in ("right", *ends):
            yield mutations.Trial(end, [end], None, lambda _, end=end: end)

    path = os.pathsep.join([str(places.ROOT), str(places.SUPPORT)])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(mutations, "SECONDS", 3.0)
    kind = mutations.Kind(len(ends), "misbehaving", trials)
    monkeypatch.setattr(mutations, "kinds", lambda: {"misbehaving": kind})
    outcomes = mutations.run("misbehaving")
    assert [x.what for x in outcomes] == ends
    assert [x.verdict for x in outcomes] == [
        "traceback" if end == "silent" else end for end in ends
    ]
