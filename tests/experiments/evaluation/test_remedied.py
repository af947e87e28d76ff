"""Remedies as rows of k-NN on the tiny planted model; what other protocols share."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import photos
import planted_models
from evaluations import results
from experiments import evaluate
from experiments.configs.evals import knn as knn_config
from experiments.evaluation import images, job, remedied
from experiments.evaluation.progress import Progress
from experiments.run.stopping import Stopping
from samples import error_of
from sinder_jax import cli, model, planted
from sinder_jax.evals import features
from sinder_jax.remedies import register_neurons

SMALL = [
    *("--config.resize=56", "--config.image_size=56", "--config.ks=1"),
    *("--config.remedy_images=2", "--config.batch_size=2", "--config.resamples=20"),
]
REMEDIES = "--config.remedies=ablation, test-time registers"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A planted model, classes of noise, and photographs for remedies."""
    root = tmp_path_factory.mktemp("remedied")
    planted_models.save(root)
    for split, count in (("train", 2), ("val", 1)):
        for place, name in enumerate(("cat", "dog")):
            for i in range(count):
                file = root / "classes" / split / name / f"{i}.png"
                photos.save_noise(file, 230, 224, seed=10 * place + i)
    for i in range(3):
        photos.save_noise(root / f"others/{i}.png", 230, 224, seed=100 + i)
    return root


def run(places, out, *arguments, config="knn", data="classes"):
    given = [f"--config={config}.py", f"--config.data={places / data}"]
    given += [f"--checkpoint={places / 'planted'}", f"--workdir={out}"]
    return evaluate.main([*given, *SMALL, *arguments])


def others(places):
    return f"--config.remedy_data={places / 'others'}"


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run(places, out, REMEDIES, others(places)) == 0
    return out


def a_job(places, out, **settings):
    config = knn_config.get_config()
    config.update({"batch_size": 2, **settings})
    opened = model.open_checkpoint(places / "planted")
    with Progress() as progress:
        return job.Job(config, opened, None, out, out, progress, Stopping())


def remedies_of(places, *names):
    config = ConfigDict({"protocol": "knn", "gamma": 0.0, "remedy_images": 2})
    config.matmul_precision, config.data = "highest", ""
    config.remedies, config.remedy_data = ",".join(names), str(places / "others")
    return remedied.prepare(config)


# --- Rows -----------------------------------------------------------------------------


def test_each_remedy_is_a_row_with_its_cost(whole, places):
    rows, start = results(whole), str(places / "planted")
    names = [start, f"{start} + ablation", f"{start} + test-time registers"]
    assert [row["checkpoint"] for row in rows] == names
    plain, ablated, moved = rows
    assert "remedy" not in plain and "seconds of the remedy" not in plain["evaluated"]
    assert ablated["remedy"] == "ablation" and moved["remedy"] == "test-time registers"
    assert ablated["digest"] != plain["digest"] == moved["digest"]
    assert ablated["evaluated"]["photographs it read"] == 0
    assert moved["evaluated"]["photographs it read"] == 2
    assert moved["evaluated"]["seconds of the remedy"] > 0
    assert moved["evaluated"]["units moved"] == f"0 of block {planted.BLOCK}"
    assert "+ test-time registers (" in (whole / "results.md").read_text()


def test_each_row_has_features_and_a_folder_of_its_own(whole):
    assert len(list((whole / "features").glob("*/rows.bin"))) == 6  # train, val
    assert len(list((whole / "states").iterdir())) == 3
    digests = {file.read_bytes() for file in whole.glob("features/*/rows.bin")}
    assert len(digests) == 6


@pytest.mark.slow  # compiles everything three times
def test_a_kill_between_remedies_leads_to_the_same_files(places, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # seconds of remedies
    given = (REMEDIES, others(places))
    run(places, tmp_path / "whole", *given)
    after, begun = remedied._after, []

    def killed(some, job, name):
        if begun:
            raise KeyboardInterrupt
        begun.append(name)
        return after(some, job, name)

    monkeypatch.setattr(remedied, "_after", killed)
    with pytest.raises(KeyboardInterrupt):
        run(places, tmp_path / "killed", *given)
    monkeypatch.setattr(remedied, "_after", after)
    run(places, tmp_path / "killed", *given)
    files = sorted(
        file.relative_to(tmp_path / "whole")
        for file in (tmp_path / "whole").rglob("*")
        if file.is_file()
    )
    assert len(files) > 20
    for file in files:
        one, other = (tmp_path / name / file for name in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), file


def test_the_seconds_of_a_remedy_are_those_of_the_first_time(whole, places):
    before = (whole / "results.json").read_bytes()
    assert run(places, whole, REMEDIES, others(places)) == 0
    assert (whole / "results.json").read_bytes() == before


def test_other_remedies_are_other_settings(whole, places, tmp_path, capsys):
    code = cli.run(lambda: run(places, whole, "--config.remedies=ablation"))
    assert code == cli.USER_ERROR
    assert "by other settings (remedies 'ablation, test" in capsys.readouterr().err


# --- Forward passes -------------------------------------------------------------------


def test_features_are_those_of_the_moved_activations(places, tmp_path):
    some = remedies_of(places, "test-time registers")
    plain, moved = (
        form.job for form in remedied.forms(some, a_job(places, tmp_path), "planted")
    )
    image = photos.prepared(places / "others/2.png", 224)[None]
    found = {}
    for name, each in (("plain", plain), ("moved", moved)):
        extract = images.extractor(each, blocks=(each.model.config.depth - 1,))
        found[name] = jax.tree.map(np.asarray, extract(image))
    units = register_neurons.Neurons(
        np.array([planted.BLOCK]), np.array([0]), np.array([1.0])
    )
    opened = moved.model
    expected = register_neurons.forward(opened.config, opened.params, units, image)
    # Other programs of XLA for the same sums: a few last bits of numbers of size 1.
    np.testing.assert_allclose(found["moved"].cls[0], expected.cls, atol=1e-4)
    np.testing.assert_allclose(found["moved"].patches[0], expected.patches, atol=1e-4)
    assert np.abs(found["plain"].patches - found["moved"].patches).max() > 0.1


def test_every_protocol_extracts_features_in_one_place():
    """`images.extractor` heeds the forward pass of a job: nobody may pass it by."""
    folder = Path(images.__file__).parent
    using = {
        file.name for file in folder.glob("*.py") if "make_ext" in file.read_text()
    }
    assert using == {"images.py"}


def test_a_forward_pass_is_part_of_all_keys(places, tmp_path):
    some = remedies_of(places, "test-time registers", "ablation")
    forms = list(remedied.forms(some, a_job(places, tmp_path), "planted"))
    assert len({form.job.features_key for form in forms}) == 3
    assert len({evaluate.state_key(form.job) for form in forms}) == 3
    assert {form.job.origin for form in forms[1:]} == {forms[0].job.model}
    same = a_job(places, tmp_path, remedies="ablation", remedy_images=3)
    assert evaluate.state_key(same) == evaluate.state_key(forms[0].job)


# --- Before anything is computed ------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["remedies=ablatoin"], "got 'ablatoin', expected some of clamping, ablation"),
        (["remedies=SINDER"], "give a repaired model as --checkpoint"),
        (["remedies=hybrid"], "give a repaired model as --checkpoint"),
        (["remedies=clamping"], "config.gamma: got 0"),
        (["remedies=ablation", "gamma=4"], "config.gamma: got 4, which is of clamping"),
        (["remedies=clamping", "gamma=nan"], "gamma"),
        (["remedies=ablation,ablation"], "one of them twice"),
        (
            ["remedies=test-time registers"],
            "test-time registers read photographs, of whatever: add "
            "--config.remedy_data=FOLDER",
        ),
        (
            ["remedies=test-time registers", "remedy_data=sample", "remedy_images=0"],
            "config.remedy_images: got 0, expected 1 to 8",
        ),
        (
            ["remedies=test-time registers", "remedy_data=sample", "remedy_images=9"],
            "config.remedy_images: got 9, expected 1 to 8, as sample has 8 photographs",
        ),
        (["remedies=,"], "config.remedies: got ',', expected some of"),
        (
            ["remedies=ablation", "remedy_data=sample"],
            "config.remedy_data: got 'sample', and no remedy of config.remedies reads",
        ),
        (
            [
                "remedies=test-time registers",
                "remedy_data=sample",
                "matmul_precision=high",
            ],
            "expected 'highest': test-time registers know no other",
        ),
        (["remedies=test-time registers", "remedy_data=nowhere"], "nowhere"),
    ],
)
def test_a_wrong_setting_is_one_line(places, tmp_path, capsys, arguments, told):
    given = [f"--config.{argument}" for argument in arguments]
    code = cli.run(lambda: run(places, tmp_path / "out", *given))
    assert code == cli.USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert [told in x for x in lines if x.startswith("error: ")] == [True]
    assert not (tmp_path / "out").exists()


def test_a_damaged_photograph_that_a_remedy_reads_is_named(tmp_path):
    for i in range(2):
        photos.save_noise(tmp_path / f"others/{i}.png", 230, 224)
    (tmp_path / "others/1.png").write_bytes(b"not a picture")
    message = error_of(remedies_of, tmp_path, "test-time registers")
    assert message.startswith(f"{tmp_path}/others/1.png: not an image")


# --- What it cost ---------------------------------------------------------------------


def test_the_cost_of_a_repair_is_read_from_its_workdir(tmp_path):
    told = {"finished": True, "seconds": 2.5, "images": 60}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text(json.dumps(told))
    cost = {"seconds of its repair": 2.5, "images its repair passed": 60}
    for name in ("run", "run/repaired", "run/repaired.pth"):
        assert remedied.cost_of_repair(str(tmp_path / name)) == cost
    assert remedied.cost_of_repair(str(tmp_path / "run/planted.safetensors")) == {}
    told = {"finished": True, "seconds": 2.5, "repair": "datafree"}
    (tmp_path / "run/summary.json").write_text(json.dumps(told))
    cost["images its repair passed"] = 0
    assert remedied.cost_of_repair(str(tmp_path / "run")) == cost
    (tmp_path / "run/summary.json").write_text("[")
    assert remedied.cost_of_repair(str(tmp_path / "run")) == {}


def test_features_of_every_row_are_found_again(whole, places, monkeypatch):
    monkeypatch.setattr(features, "make_extract", None)  # calling it would raise
    assert run(places, whole, REMEDIES, others(places)) == 0
