"""benchmarks/faults/power_loss.py: what it damages, and what it calls right."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.faults import power_loss
from sinder_jax import checkpoint, planted


def write(path: Path, *, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(range(1, 251)) * 80)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_only_files_of_the_last_two_seconds_are_damaged(tmp_path):
    seen = set()
    for seed in range(60):
        old = write(tmp_path / "states" / "old", age=2.1)
        young = [write(tmp_path / "states" / name, age=1.9) for name in "ab"]
        whole = old.read_bytes()
        told = power_loss.lose(tmp_path, 1e9, random.Random(seed))
        assert old.read_bytes() == whole
        damaged = [
            path for path in young if not path.exists() or path.read_bytes() != whole
        ]
        assert len(damaged) == len(told)
        seen |= {line.split()[0] for line in told}
    assert seen == set(power_loss.FAULTS)


def test_faults_are_what_their_names_say(tmp_path):
    path, size = tmp_path / "file", 20_000
    for fault, left in (("emptied", 0), ("cut", size // 2), ("holes", size)):
        power_loss.inflict(fault, write(path))
        assert path.stat().st_size == left
    assert path.read_bytes().count(0) == 2 * power_loss.BLOCK
    power_loss.inflict("removed", path)
    assert not path.exists()


@pytest.fixture
def ended(tmp_path) -> Path:
    """The files of a finished run, as far as they are compared."""
    folder = tmp_path / "alone"
    write(folder / "repaired.safetensors")
    made = planted.planted_model(0)
    checkpoint.save(folder / "repaired", made.config, made.params)
    counts = dict.fromkeys(power_loss.COUNTS, 0)
    (folder / "summary.json").write_text(json.dumps(counts | {"seconds": 3}))
    (folder / "metrics.jsonl").write_text("0\n1\n2\n")
    return folder


def test_differences_are_found(ended, tmp_path):
    other = Path(shutil.copytree(ended, tmp_path / "other"))
    assert power_loss.differences(other, ended, "") == []
    (other / "metrics.jsonl").write_text("0\n2\n")
    told = "warning: metrics.jsonl lacks 1 of 3 images: 1"
    assert power_loss.differences(other, ended, told) == []
    assert len(power_loss.differences(other, ended, "")) == 1
    (other / "metrics.jsonl").write_text("0\n0\n1\n2\n")
    (other / "summary.json").write_text(json.dumps({"images": 9}))
    (other / "repaired.safetensors").unlink()
    checkpoint_of_another = planted.planted_model(1)
    shutil.rmtree(other / "repaired")
    checkpoint.save(
        other / "repaired", checkpoint_of_another.config, checkpoint_of_another.params
    )
    found = power_loss.differences(other, ended, "")
    assert len(found) == 3 + len(power_loss.COUNTS)


@pytest.mark.slow
def test_a_loss_in_every_phase_ends_right_or_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["power_loss", "--seed=1", "--losses=8"])
    assert power_loss.main() == 0
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total[0] == "all" and int(total[1]) + int(total[2]) == 8
