"""A damaged run goes on to the same results, or is refused in one line.

On copies of a run of twelve steps that was stopped after seven, and of the same run at
its end. `benchmarks/power_loss.py` damages runs that were killed.
"""

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import repair, status
from experiments.run import results
from rows import STRANGE, line
from sinder_jax import checkpoint, cli

# Saved after every third image.
SHORT = (
    "--config=tiny.py",
    "--config.images_per_step=1",
    "--config.max_iter=12",
    "--config.checkpoint_every=3",
    "--config.picture_every=1000",
    "--config.measure_images=1",
)
COUNTS = (
    "images",
    "images_with_defect",
    "images_not_finite",
    "images_unreadable",
    "files_not_finite",
    "unreadable_files",
    "share_of_last_images_without_defect",
)


def start(workdir: Path, *arguments: str) -> tuple[int, list[str]]:
    """A start of the run: its exit code, and the lines on stderr."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(
            lambda: repair.main([*SHORT, *arguments, f"--workdir={workdir}"])
        )
    return code, told.getvalue().splitlines()


@pytest.fixture(scope="module", autouse=True)
def no_picture():
    """Drawing takes half the time of a start."""
    with pytest.MonkeyPatch.context() as patched:
        blank = np.zeros((8, 8, 3), np.uint8)
        patched.setattr(results.Observer, "picture", lambda *_: blank)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def stopped(folder) -> Path:
    """Stopped after seven images, with the states after 6 and 7."""
    step = repair.Runner.step

    def interrupted(self, batch):
        if 6 in batch.positions:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(repair.Runner, "step", interrupted)
        assert start(folder / "stopped") == (cli.TRY_AGAIN, [])
    return folder / "stopped"


@pytest.fixture(scope="module")
def whole(stopped, folder) -> Path:
    shutil.copytree(stopped, folder / "whole")
    assert start(folder / "whole") == (0, [])
    return folder / "whole"


@pytest.fixture
def copy(tmp_path):
    """Returns a copy of a run that a test may damage."""
    return lambda run: Path(shutil.copytree(run, tmp_path / "run"))


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def assert_same(workdir: Path, whole: Path, names: Iterable[str]) -> None:
    for name in names:
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    got, want = (checkpoint.load(path / "repaired")[1] for path in (workdir, whole))
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
    got, want = summary(workdir), summary(whole)
    assert got["finished"] is True
    assert [got[name] for name in COUNTS] == [want[name] for name in COUNTS]


# --- metrics.jsonl --------------------------------------------------------------------


def lines(workdir: Path) -> list[bytes]:
    return (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)


DAMAGES = {
    "lost": lambda good: [*good[:2], *good[3:]],
    "doubled": lambda good: [*good[:3], *good[2:]],
    "cut": lambda good: [*good[:2], good[2][:30], *good[3:]],
    "zeros": lambda good: [*good[:2], b"\0" * len(good[2]), *good[3:]],
    "strange": lambda good: [*good[:2], *STRANGE.values(), *good[3:], line(999)],
    "all": lambda good: [],
}
LACKING = {"doubled": "", "cut": "2-3", "zeros": "2-3", "all": "0-6"}  # else 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=[] if name in ("strange", "all") else pytest.mark.slow)
        for name in DAMAGES
    ],
)
def test_a_run_counts_its_images_whatever_its_metrics_say(damage, stopped, whole, copy):
    workdir, good = copy(stopped), lines(stopped)
    assert len(good) == 7 and summary(whole)["images_with_defect"] >= 10
    (workdir / "metrics.jsonl").write_bytes(b"".join(DAMAGES[damage](good)))
    code, told = start(workdir)
    images = LACKING.get(damage, "2")
    assert code == 0 and len(told) == bool(images)
    assert all(each.endswith(f" of 7 images: {images}") for each in told)
    first, _, last = images.partition("-")
    lacking = range(int(first), int(last or first) + 1) if images else ()
    want = [each for i, each in enumerate(lines(whole)) if i not in lacking]
    assert lines(workdir) == want
    assert_same(workdir, whole, ["repaired.safetensors"])
    assert status.main([str(workdir)]) == 0
