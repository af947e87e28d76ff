"""A damaged run goes on to the same results, or is refused in one line.

On copies of a run of twelve steps that was stopped after seven, and of the same run at
its end. `benchmarks/faults/power_loss.py` damages runs that were killed.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
from benchmarks.faults.power_loss import COUNTS, FAULTS, inflict
from convert.__main__ import main as convert_main
from experiments import repair, status
from experiments.run import results
from rows import STRANGE, line
from sinder_jax import checkpoint, cli, factor

# Saved after every third image.
SHORT = (
    "--config=tiny.py",
    "--config.images_per_step=1",
    "--config.max_iter=12",
    "--config.checkpoint_every=3",
    "--config.picture_every=1000",
    "--config.measure_images=1",
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


# --- Files and folders ----------------------------------------------------------------


def parametrized(always: Iterable[tuple[str, str]], names: Iterable[str]):
    """Every fault of every file; only some of them in the tests of every day."""
    return pytest.mark.parametrize(
        "name, fault",
        [
            pytest.param(*pair, marks=[] if pair in [*always] else pytest.mark.slow)
            for pair in itertools.product(names, FAULTS)
        ],
    )


WEIGHTS = ["repaired.safetensors", "repaired.patch.safetensors", "repaired.pth"]


@parametrized(
    [("repaired", "emptied"), ("repaired.safetensors", "holes")],
    ["repaired", *WEIGHTS, "repaired.safetensors.sha256", "before_after.png"],
)
def test_a_finished_run_makes_its_damaged_files_again(name, fault, whole, copy):
    workdir = copy(whole)
    if not (workdir / name).exists():
        pytest.skip("needs torch")
    inflict(fault, workdir / name)
    code, told = start(workdir)
    assert code == 0 and len(told) == 1
    assert f"is finished, but missing or damaged: {name}; made again" in told[0]
    assert_same(workdir, whole, ["metrics.jsonl", *WEIGHTS[:2]])
    assert start(workdir) == (0, [])


def test_without_a_state_it_says_what_it_lacks(whole, copy):
    workdir = copy(whole)
    shutil.rmtree(workdir / "states")
    assert start(workdir) == (0, [])
    (workdir / "repaired.safetensors").unlink()
    code, (told,) = start(workdir)
    assert code == 2 and told.startswith("error: ")
    assert "missing or damaged: repaired.safetensors; no state is left" in told


@parametrized([("repaired", "emptied")], ["repaired", *WEIGHTS[:2]])
def test_an_export_without_a_summary_is_not_trusted(name, fault, whole, copy):
    workdir = copy(whole)
    (workdir / "summary.json").unlink()
    inflict(fault, workdir / name)
    assert start(workdir) == (0, [])
    assert_same(workdir, whole, ["metrics.jsonl", *WEIGHTS[:2]])


@parametrized([("summary.json", "cut")], ["summary.json", "alive.json"])
def test_a_damaged_summary_is_written_again(name, fault, whole, copy):
    workdir = copy(whole)
    inflict(fault, workdir / name)
    code, told = start(workdir)
    assert code == 0 and all("summary.json is damaged" in each for each in told)
    assert len(told) == (name == "summary.json" and fault != "removed")
    assert_same(workdir, whole, ["metrics.jsonl", *WEIGHTS[:2]])


@parametrized([("stopped", "holes")], ["stopped", "begun"])
def test_damaged_factors_are_made_again(name, fault, stopped, whole, copy):
    """With the bits of before, which the state checks."""
    workdir = copy(stopped)
    if name == "begun":
        shutil.rmtree(workdir / "states")
        (workdir / "metrics.jsonl").unlink()
    inflict(fault, workdir / "frozen")
    code, told = start(workdir)
    assert code == 0 and len(told) == (name == "stopped" or fault != "removed")
    assert all(each.endswith("made again") for each in told)
    assert_same(workdir, whole, ["metrics.jsonl", *WEIGHTS[:2]])


def test_factors_with_other_bits_are_refused_and_so_is_their_delta(
    stopped, copy, monkeypatch, capsys
):
    workdir = copy(stopped)
    inflict("removed", workdir / "frozen")
    factorize = factor.factorize

    def turned(config, params):
        factors = factorize(config, params)
        return factors.replace(u={name: -u for name, u in factors.u.items()})

    monkeypatch.setattr(factor, "factorize", turned)
    for _ in range(2):
        code, told = start(workdir)
        assert code == 2 and "was made again, with other bits" in told[-1]
    delta = workdir.parent / "delta.safetensors"
    assert convert_main(["diff", str(workdir), str(delta)]) == 2
    assert "the singular vectors of before" in capsys.readouterr().err


@parametrized([("one", "cut")], ["one", "all"])
def test_damaged_states(name, fault, stopped, whole, copy):
    """One: the state before is taken. All: refused."""
    workdir = copy(stopped)
    newest = workdir / "states" / "00000007"
    inflict(fault, newest if name == "one" else workdir / "states")
    if (name, fault) == ("all", "removed"):  # from the first image on
        code, told = start(workdir)
        assert code == 0 and len(told) == 1 and "holds no state" in told[0]
        assert_same(workdir, whole, ["metrics.jsonl", *WEIGHTS[:2]])
        return
    code, told = start(workdir)
    assert len(told) == ((name, fault) != ("one", "removed"))
    if name == "all":
        assert code == 2 and "move them away to start again" in told[0]
        return
    assert code == 0
    assert_same(workdir, whole, ["metrics.jsonl", *WEIGHTS[:2]])


@parametrized([("state", "emptied")], ["state", "no state"])
def test_a_damaged_config(name, fault, stopped, whole, copy):
    workdir = copy(stopped)
    if name == "no state":
        shutil.rmtree(workdir / "states")
        (workdir / "summary.json").unlink()
    inflict(fault, workdir / "config.json")
    code, told = start(workdir)
    assert len(told) == 1 and "config.json is " in told[0]
    if name == "no state":
        assert code == 2 and "put it back from a copy" in told[0]
        return
    assert code == 0
    names = ["metrics.jsonl", "config.json", *WEIGHTS[:2]]
    assert_same(workdir, whole, names)


@parametrized([("repaired", "holes")], ["repaired"])
def test_a_damaged_model_of_a_run_is_not_opened(name, fault, whole, copy):
    workdir = copy(whole)
    inflict(fault, workdir / name)
    with pytest.raises(ValueError) as caught:
        convert.open_model(workdir).params  # noqa: B018  (reads the weights)
    assert "\n" not in str(caught.value) and str(workdir) in str(caught.value)


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


def test_a_finished_run_tells_what_its_metrics_lack(whole, copy):
    workdir, good = copy(whole), lines(whole)
    (workdir / "metrics.jsonl").write_bytes(b"".join(good)[:-20])
    for _ in range(2):
        code, (told,) = start(workdir)
        assert code == 0 and told.endswith("lacks 1 of 12 images: 11")
        assert lines(workdir) == good[:-1]
    assert_same(workdir, whole, WEIGHTS[:2])
