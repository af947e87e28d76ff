"""The diagnosis of a run: when it ends the run, what it stores, when it is made again.

The models are the planted one, with and without the unit that makes its defect.
"""

import contextlib
import io
import json

import numpy as np
import pytest

import real
from convert import open_model
from experiments import repair, status
from experiments.run import diagnosis, inputs
from photos import save_noise
from sinder_jax import launch, planted
from sinder_jax.data import listing

TINY = ("--config=tiny.py", "--config.images_per_step=1")
OFF = "--config.diagnose=off"
ALL_THE_SAME = "to repair it all the same, add --config.diagnose=off"


class GoesOn(Exception):
    """A run goes on to its repair."""


@pytest.fixture(autouse=True)
def no_repair(monkeypatch):
    """Ends a run where its repair would begin."""

    def resume(run, options, *_):
        raise GoesOn(options.first_block)

    monkeypatch.setattr(repair, "resume", resume)


@pytest.fixture
def sound(monkeypatch):
    """Takes the planted unit out of the model that the runs of a test begin with."""
    make = planted.planted_model

    def without(seed: int = 0) -> planted.PlantedModel:
        made = make(seed)
        made.params["blocks"]["mlp"]["w3"]["kernel"][made.block][0] = 0
        return made

    monkeypatch.setattr(planted, "planted_model", without)


def run(folder, *arguments) -> str:
    """What a start prints that ends with its diagnosis."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert repair.main([*TINY, *arguments, f"--workdir={folder}"]) == 0
    return output.getvalue()


def goes_on(folder, *arguments) -> int:
    """First block of a start that goes on to repair."""
    with pytest.raises(GoesOn) as caught:
        repair.main([*TINY, *arguments, f"--workdir={folder}"])
    return caught.value.args[0]


def refusal(capsys, folder, *arguments) -> str:
    """The one line of a start that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        command = [*TINY, *arguments, f"--workdir={folder}"]
        launch.exit_on_error(lambda: repair.main(command))
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def facts(folder, name="diagnosis.json") -> dict:
    return json.loads((folder / name).read_text())


# --- Without a defect -----------------------------------------------------------------


def test_a_model_without_a_defect_ends_there(sound, tmp_path):
    told = run(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert not any(name.startswith(("repaired", "frozen")) for name in names)
    summary = facts(tmp_path, "summary.json")
    assert summary["finished"] and summary["verdict"] == "no singular defect"
    assert summary["diagnosis"]["photographs"] == 4
    assert summary["diagnosis"]["with_defect"] == 0
    assert max(summary["diagnosis"]["forecast"]["gaps"]) < 1.1
    assert len(summary["diagnosis"]["large_share"]) == planted.CONFIG.depth
    labels = [line.split()[0] for line in told.splitlines()[-6:]]
    assert labels == ["weights", "tokens", "by", "along", "verdict", "finished:"]
    assert "verdict   no singular defect (diagnosis.json)" in told
    assert told.endswith(f"{ALL_THE_SAME}\n")


def test_started_again_it_says_so_and_diagnoses_no_more(sound, tmp_path, monkeypatch):
    first = run(tmp_path)
    summary = facts(tmp_path, "summary.json")
    monkeypatch.delattr(diagnosis, "diagnose")
    assert run(tmp_path).splitlines()[-6:] == first.splitlines()[-6:]
    assert facts(tmp_path, "summary.json") == summary
    assert goes_on(tmp_path, OFF) == 0
    assert (tmp_path / "frozen").exists()
    assert goes_on(tmp_path) == 0  # a repair has begun: no verdict ends it any more


def test_without_a_diagnosis_it_is_repaired_all_the_same(sound, tmp_path):
    assert goes_on(tmp_path, OFF) == 0
    assert not (tmp_path / "diagnosis.json").exists()
    assert goes_on(tmp_path) == 0  # it has begun, and is not diagnosed any more
    assert not (tmp_path / "diagnosis.json").exists()


def test_status_says_what_was_found_and_how_to_go_on(sound, tmp_path, capsys):
    run(tmp_path)
    capsys.readouterr()
    assert status.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no singular defect: 0 of 4 photographs show it" in shown
    assert f"nothing was repaired; {ALL_THE_SAME}" in shown


def test_there_is_no_repaired_model_to_open(sound, tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="or found nothing to repair"):
        open_model(tmp_path)


def test_other_weights_are_refused_where_a_run_has_ended(
    sound, tmp_path, capsys, monkeypatch
):
    run(tmp_path)
    make = planted.planted_model
    monkeypatch.setattr(planted, "planted_model", lambda seed: make(seed + 1))
    line = refusal(capsys, tmp_path)
    assert "holds a diagnosis of other weights: their digest was" in line


# --- With a defect --------------------------------------------------------------------


def test_a_defect_is_named_and_the_run_goes_on(tmp_path, capsys):
    assert goes_on(tmp_path) == 0  # the authors' search begins with block 0
    told = capsys.readouterr().out
    assert "verdict   singular defect in block 5 (diagnosis.json)" in told
    found = facts(tmp_path)
    assert (found["with_defect"], found["block"]) == (4, 5)
    assert found["forecast"]["block"] == 5
    assert found["large_share"] == found["defective_share"]
    assert found["large_share"] == 5 * [0] + 7 * [7 / 256]
    assert found["angle"] < 10


def test_auto_searches_from_the_diagnosed_block_on(tmp_path, monkeypatch):
    assert goes_on(tmp_path, "--config.first_block=auto") == 5
    monkeypatch.delattr(diagnosis, "diagnose")
    assert goes_on(tmp_path, "--config.first_block=auto") == 5


def test_auto_needs_a_block():
    seen = {"verdict": "traces of a singular defect", "block": -1}
    given = diagnosis.Diagnosis(seen)
    with pytest.raises(ValueError, match="traces of a singular defect and names no"):
        given.options(repair.repair.RepairOptions(), inputs.AUTO)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--config.first_block=12"], "must be a block from 0 to 11, or auto, got 12"),
        (["--config.first_block=-2"], "must be from -1 to"),
        (["--config.first_block=five"], "must be a whole number like 0 or auto, got"),
        (["--config.diagnose=maybe"], "must be on or off, got 'maybe'"),
        ([OFF, "--config.first_block=auto"], "leave config.diagnose=on"),
    ],
)
def test_impossible_options_are_refused(arguments, want, tmp_path, capsys):
    assert want in refusal(capsys, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_first_block_belongs_to_the_result(tmp_path, capsys):
    assert goes_on(tmp_path, "--config.first_block=3") == 3
    assert "first_block was 3 and is 0" in refusal(capsys, tmp_path)
    assert goes_on(tmp_path, "--force") == 0


# --- What is read, and what is stored -------------------------------------------------


def test_at_most_sixteen_photographs_are_read(sound, tmp_path, monkeypatch):
    for i in range(40):
        save_noise(tmp_path / "photos" / f"{i:02d}.png", 60, 60, seed=i)
    read, original = set(), listing.File.read

    def counted(self, **options):
        read.add(self.name)
        return original(self, **options)

    monkeypatch.setattr(listing.File, "read", counted)
    photos = (f"--config.data={tmp_path / 'photos'}", "--config.num_images=40")
    run(tmp_path / "run", *photos)
    assert facts(tmp_path / "run")["photographs"] == len(read) == diagnosis.MOST


def test_unreadable_photographs_are_passed_over(sound, tmp_path):
    for i in range(20):
        save_noise(tmp_path / "photos" / f"{i:02d}.png", 60, 60, seed=i)
    for i in (0, 9, 19):  # 0 has another photograph in its part, the others do not
        (tmp_path / "photos" / f"{i:02d}.png").write_bytes(b"no image")
    photos = (f"--config.data={tmp_path / 'photos'}", "--config.num_images=20")
    run(tmp_path / "run", *photos)
    found = facts(tmp_path / "run")["blocks"]
    assert len(found) == 14 and str(tmp_path / "photos" / "01.png") in found


def test_tokens_that_are_not_finite_everywhere_are_an_error(
    tmp_path, monkeypatch, capsys
):
    look = diagnosis.diagnosis.look

    def overflowing(*arguments, **options):
        found = look(*arguments, **options)
        return found._replace(norms=found.norms * np.inf)

    monkeypatch.setattr(diagnosis.diagnosis, "look", overflowing)
    assert "finite tokens" in refusal(capsys, tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "another number"])
def test_a_damaged_diagnosis_is_made_again(damage, sound, tmp_path, capsys):
    run(tmp_path)
    path = tmp_path / "diagnosis.json"
    good = path.read_text()
    bad = good.replace('"block": -1', '"block": 3') if "number" in damage else good[:99]
    assert bad != good
    path.write_text(bad)
    capsys.readouterr()
    run(tmp_path)
    line = capsys.readouterr().err
    assert f"{path} is damaged" in line and "diagnosed again" in line
    again, before = facts(tmp_path), json.loads(good)
    for each in (again, before):
        del each["seconds"], each["sha256"]
    assert again == before


def test_other_settings_before_the_repair_diagnose_again(tmp_path, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(inputs, "prepare", killed)
        repair.main([*TINY, f"--workdir={tmp_path}"])
    assert facts(tmp_path)["of"]["mask_thr"] == 4.0
    capsys.readouterr()
    goes_on(tmp_path, "--config.mask_thr=5")
    assert "is of other weights, photographs or settings" in capsys.readouterr().err
    assert facts(tmp_path)["of"]["mask_thr"] == 5.0


def test_a_summary_counts_the_false_alarms(tmp_path):
    goes_on(tmp_path)
    layers = [2, 5, 5, None, -1, 6]
    line = {"file": "a.png", "loss": 1.0, "alpha": 1.0, "num_outliers": 3}
    line |= {"finite": True, "skipped": 0.0, "readable": True}
    rows = [{"image": i, "layer": layer, **line} for i, layer in enumerate(layers)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    given = diagnosis.Diagnosis(facts(tmp_path))
    with repair.Workdir(tmp_path) as workdir:
        assert given.summary(workdir) == {
            "verdict": "singular defect",
            "block": 5,
            "false_alarms": 1,
        }


# --- A trained model ------------------------------------------------------------------

TRAINED = (
    "--config=planted_small.py",
    "--config.image_size=224",
    "--config.data=sample",
)


@pytest.mark.real
def test_a_trained_small_model_has_no_singular_defect(tmp_path):
    arguments = (f"--config.checkpoint={real.backbone()}", "--config.plant=")
    told = run(tmp_path, *TRAINED, *arguments)
    assert told.endswith(f"{ALL_THE_SAME}\n")
    found = facts(tmp_path, "summary.json")
    assert found["verdict"] == "no singular defect" and found["files"] == []
    assert found["diagnosis"]["photographs"] <= diagnosis.MOST
    assert max(found["diagnosis"]["defective_share"]) == 0
    assert max(found["diagnosis"]["norm_ratio"]) < 3
    assert not list(tmp_path.glob("repaired*"))


@pytest.mark.real
def test_a_defect_planted_in_it_is_named_with_its_block(tmp_path):
    arguments = (f"--config.checkpoint={real.backbone()}", "--config.first_block=auto")
    assert goes_on(tmp_path, *TRAINED, *arguments) == 4
    found = facts(tmp_path)
    assert found["verdict"] == "singular defect" and found["forecast"]["block"] == 4
    assert found["with_defect"] == found["photographs"]
