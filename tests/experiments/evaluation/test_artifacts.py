"""The meter of remedies from its command line, on the tiny planted model."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import photos
import planted_models
import scene_trees
from evaluations import command, results
from experiments import evaluate
from experiments.evaluation import artifacts, images, remedied
from samples import SMALL as SMALL_MODELS
from samples import random_params
from sinder_jax import checkpoint, cli, model
from sinder_jax.evals import features

SMALL = [
    *("--config.image_size=224", "--config.num_images=4", "--config.batch_size=1"),
    *("--config.remedy_images=2", "--config.resamples=50"),
]
REMEDIES = "--config.remedies=ablation,test-time registers"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A planted model, its truth, and seven photographs."""
    root = tmp_path_factory.mktemp("meter")
    planted_models.save(root)
    for i in range(7):
        photos.save_noise(root / f"data/{i}.png", 260, 240, seed=i)
    return root


def run(places, out, *arguments, checkpoints=("planted",)):
    named = [f"--checkpoint={places / name}" for name in checkpoints]
    given = ["--config=artifacts.py", f"--config.data={places / 'data'}"]
    return evaluate.main([*given, f"--workdir={out}", *named, *SMALL, *arguments])


@pytest.fixture(scope="module")
def measured(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    truth = f"--config.truth={places / 'truth'}"
    both = ("planted", "truth")
    assert run(places, out, REMEDIES, truth, checkpoints=both) == 0
    return out


def test_remedies_mend_and_the_model_itself_does_not(measured, places):
    rows = results(measured)
    start = str(places / "planted")
    assert [row["checkpoint"] for row in rows] == [
        start,
        f"{start} + ablation",
        f"{start} + test-time registers",
        str(places / "truth"),
    ]
    found = [row["metrics"] for row in rows]
    assert found[0]["mending"] == 0 and abs(found[0]["damage"]) < 1e-5
    assert found[0]["defective by norm"] > 0 and found[0]["norm ratio"] > 3
    for mended in found[1:]:
        assert mended["mending"] == 1 and mended["defective by norm"] == 0
        assert mended["norm ratio"] < found[0]["norm ratio"] / 2
        assert mended["tail"] < found[0]["tail"]
        assert mended["truth, thrown"] > 0.9 > found[0]["truth, thrown"]
        assert 0 < mended["damage"] < 0.05
    assert found[3]["truth, sound"] == pytest.approx(1, abs=1e-5)
    assert found[3]["truth, thrown"] == pytest.approx(1, abs=1e-5)


def test_every_number_has_an_interval_and_a_remedy_its_cost(measured):
    rows = results(measured)
    for row in rows:
        assert set(row["intervals"]) == set(row["metrics"])
        for name, (low, high) in row["intervals"].items():
            assert low - 1e-6 <= row["metrics"][name] <= high + 1e-6
    assert "remedy" not in rows[0] and rows[1]["remedy"] == "ablation"
    assert rows[1]["evaluated"]["photographs it read"] == 0
    assert rows[2]["evaluated"]["photographs it read"] == 2
    assert rows[2]["evaluated"]["seconds of the remedy"] > 0
    table = (measured / "results.md").read_text()
    head, _, start, ablated, moved, truth, *_ = table.split("\n\n")[1].split("\n")
    assert head.endswith("| seconds | photographs |")
    assert start.endswith("|  |  |") and truth.endswith("|  |  |")
    assert ablated.endswith("| 0 |") and moved.endswith("| 2 |")
    assert "| damage |" in table and "is better" not in table
    assert "\nIn brackets: 95 % intervals" in table
    assert (measured / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(places, tmp_path, monkeypatch):
    out, write, begun = tmp_path / "out", images._write, []
    monkeypatch.setattr(images, "LEAST_CHUNK", 2)

    def write_some(*arguments):
        if len(begun) == 3:
            raise KeyboardInterrupt
        begun.append(arguments)
        write(*arguments)

    monkeypatch.setattr(images, "_write", write_some)
    with pytest.raises(KeyboardInterrupt):
        run(places, out, REMEDIES)
    monkeypatch.setattr(images, "_write", write)
    run(places, out, REMEDIES)
    after = results(out)
    monkeypatch.setattr(features, "make_extract", None)  # calling it would raise
    run(places, out, REMEDIES)
    assert results(out) == after
    monkeypatch.undo()
    run(places, tmp_path / "whole", REMEDIES)
    whole = results(tmp_path / "whole")
    assert [x["metrics"] for x in whole] == [x["metrics"] for x in after]
    assert [x["intervals"] for x in whole] == [x["intervals"] for x in after]


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_numbers(places, tmp_path):
    found = {}
    for devices in (1, 4):
        flags = f"--xla_force_host_platform_device_count={devices}"
        # XLA's thread pool has a thread for each core or device, whichever are more.
        environment = {**os.environ, "XLA_FLAGS": flags, "NPROC": "4"}
        out = tmp_path / str(devices)
        command = [sys.executable, "-m", "experiments.evaluate"]
        command += ["--config=artifacts.py", f"--config.data={places / 'data'}"]
        command += [f"--workdir={out}", f"--checkpoint={places / 'planted'}", *SMALL]
        command += [f"{REMEDIES},data-free"]
        subprocess.run(command, env=environment, check=True)
        found[devices] = results(out)
        for row in found[devices][1:]:
            assert row["evaluated"].pop("seconds of the remedy") >= 0
    assert found[1] == found[4]
    for file in (tmp_path / "1").rglob("rows.bin"):
        other = tmp_path / "4" / file.relative_to(tmp_path / "1")
        assert file.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--config.image_size=28", "at least three patches, 42"),
        ("--config.num_images=0", "config.num_images: got 0"),
        ("--config.mask_thr=0", "mask_thr"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(places, tmp_path, capsys, argument, told):
    assert cli.run(lambda: run(places, tmp_path / "out", argument)) == cli.USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert [told in x for x in lines if x.startswith("error: ")] == [True]
    assert not (tmp_path / "out").exists()


def test_photographs_that_remedies_read_are_not_measured(places):
    config = evaluate._config("artifacts.py", SMALL)
    config.data = str(places / "data")
    config.remedies, config.num_images = "ablation", 7
    assert len(artifacts.chosen(config)) == 7
    config.remedies = "test-time registers"
    read = {x.name for x in remedied.prepare(config).photographs}
    measured = {x.name for x in artifacts.chosen(config)}
    assert len(read) == 2 and len(measured) == 5 and not read & measured
    config.remedy_images = 7
    with pytest.raises(ValueError, match="got 7, expected 1 to 6, .* are measured"):
        artifacts.chosen(config)
    config.remedy_data = f"{places}/./data"  # the same in another spelling
    with pytest.raises(ValueError, match=r"but those that remedies read \(7\)"):
        artifacts.chosen(config)
    config.remedy_data = "sample"
    assert len(artifacts.chosen(config)) == 7


# --- Where a number is undefined ------------------------------------------------------


@pytest.fixture(scope="module")
def bare(places, tmp_path_factory):
    """A model without a defect on one photograph of one color; and what was told."""
    root = tmp_path_factory.mktemp("bare")
    (root / "data").mkdir()
    Image.new("RGB", (120, 120), (90, 30, 200)).save(root / "data/plain.png")
    small = ["--config.image_size=112", "--config.remedies=ablation"]
    small.append(f"--config.data={root / 'data'}")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert run(places, root / "out", *small, checkpoints=("truth",)) == 0
    return root / "out", told.getvalue()


def test_a_model_without_a_defect_has_nothing_to_mend(bare):
    out, lines = bare
    rows = results(out)
    for name in ("mending", "defective along nu"):  # no ν is forecast
        assert [row["metrics"][name] for row in rows] == [None, None]
    assert rows[1]["metrics"]["damage"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["differences"]["mending"] is None
    assert rows[1]["digest"] == rows[0]["digest"]  # ablation left it as it is
    assert rows[1]["evaluated"]["weights changed"] == "none"
    assert "weights changed" not in rows[0]["evaluated"]
    assert "NaN" not in (out / "results.json").read_text()
    assert "damage 0.0000 [–], mending – (images: 1" in lines
    table = (out / "results.md").read_text()
    assert "| 0.0000 [–] | – | 0.0000 [–] |" in table
    assert "nan" not in table + lines and "–: undefined, for want of" in table
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_one_photograph_has_no_interval(bare):
    for row in results(bare[0]):
        intervals = {**row["intervals"], **row["difference_intervals"]}
        assert set(row["intervals"]) == set(row["metrics"])
        assert all(interval == [None, None] for interval in intervals.values())
    table = (bare[0] / "results.md").read_text()
    assert "One image was evaluated: there is no interval (–)." in table
    assert "as an interval" not in table
    assert "bootstrap" not in table


def test_a_photograph_of_one_color_has_no_variation_to_divide_by(bare):
    assert [row["metrics"]["PCA variation"] for row in results(bare[0])] == [None, None]


def sums(**changed):
    """A photograph's sums with nothing in them but what is given, as `score` wants."""
    of = dict.fromkeys(artifacts.COLUMNS, 0.0) | {"patches": 9.0} | changed
    return np.array([of[name] for name in artifacts.COLUMNS])


def test_without_a_sound_token_damage_is_undefined():
    all_large = sums(large=9, large_before=9, thrown=9, true_thrown=4.5)
    found = artifacts.score(True, all_large, 1)
    assert np.isnan(found["damage"]) and np.isnan(found["truth, sound"])
    assert found["mending"] == 0 and found["defective by norm"] == 1
    assert found["truth, thrown"] == 0.5
    assert "truth, thrown" not in artifacts.score(False, all_large, 1)


def test_a_remedy_can_make_it_worse():
    assert artifacts.score(False, sums(large=6, large_before=2), 1)["mending"] == -2


# --- What cannot be measured ----------------------------------------------------------


def failure(capsys, *arguments, **options):
    assert cli.run(lambda: run(*arguments, **options)) == cli.USER_ERROR
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    return line.removeprefix("error: ")


def test_a_model_with_registers_is_not_compared_token_by_token(places, tmp_path):
    config, _ = checkpoint.load(places / "planted")
    config = dataclasses.replace(config, num_register_tokens=2)
    checkpoint.save(places / "registers", config, random_params(config))
    out, truth = tmp_path / "out", f"--config.truth={places / 'truth'}"
    assert run(places, out, truth, checkpoints=("planted", "registers")) == 0
    planted, other = results(out)
    for name in ("damage", "truth, sound", "truth, thrown"):
        assert planted["metrics"][name] is not None
        assert other["metrics"][name] is None, name
    for name in ("mending", "norm ratio", "tail", "defective along nu"):
        assert np.isfinite(other["metrics"][name]), name
    assert other["evaluated"]["registers"] == 2
    assert "registers" not in planted["evaluated"]


def test_models_of_other_architectures_are_refused(places, tmp_path, capsys):
    other = tmp_path / "other"
    checkpoint.save(
        other, SMALL_MODELS["swiglu"], random_params(SMALL_MODELS["swiglu"])
    )
    checkpoints = ("planted", other)
    message = failure(capsys, places, tmp_path / "out", checkpoints=checkpoints)
    assert f"planted and {other} have different architectures: embed_dim" in message
    truth = f"--config.truth={other}"
    message = failure(capsys, places, tmp_path / "out", truth)
    assert f"planted and {other} have different architectures: embed_dim" in message
    assert not (tmp_path / "out").exists()


def test_a_damaged_photograph_is_named(places, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.png").write_bytes(b"not a picture")
    photos.save_noise(tmp_path / "data/1.png", 240, 240)
    message = failure(
        capsys, places, tmp_path / "out", f"--config.data={tmp_path / 'data'}"
    )
    assert message.startswith(f"{tmp_path}/data/0.png: not an image")


def test_remedies_that_read_all_photographs_leave_none(places, tmp_path, capsys):
    given = ("--config.remedies=test-time registers", "--config.remedy_images=7")
    message = failure(capsys, places, tmp_path / "out", *given)
    assert "config.remedy_images: got 7, expected 1 to 6" in message


@pytest.mark.parametrize("key", ["checkpoint", "truth"])
def test_models_that_resample_differently_are_compared_at_their_own_size(
    places, tmp_path, capsys, key
):
    """Their tokens differ elsewhere, even where the weights are the same."""
    given, other = model.open_checkpoint(places / "planted"), tmp_path / "other"
    config = dataclasses.replace(given.config, interpolate_antialias=True)
    checkpoint.save(other, config, given.params)
    names = [f"--config.truth={other}"] if key == "truth" else []
    both = ("planted", other) if key == "checkpoint" else ("planted",)
    small = [*names, "--config.image_size=112"]
    code = cli.run(lambda: run(places, tmp_path / "out", *small, checkpoints=both))
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == cli.USER_ERROR and not (tmp_path / "out").exists()
    assert "resamples its position embedding without antialias and offset" in error
    assert f"{other} with antialias" in error
    assert "cannot be compared but at --config.image_size=224, where" in error
    assert run(places, tmp_path / "out", *names, checkpoints=both) == 0
    row = results(tmp_path / "out")[-1]["metrics"]
    same = row["truth, sound"] if key == "truth" else 1 - row["damage"]
    assert same == pytest.approx(1, abs=1e-6)


# --- k-NN and segmentation beside -----------------------------------------------------


def test_labels_that_do_not_fit_are_one_line(places, tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            photos.save_noise(tmp_path / f"classes/{split}/{name}/0.png")
    out, classes = tmp_path / "out", f"--config.knn={tmp_path / 'classes'}"
    message = failure(capsys, places, out, classes)
    assert f"{classes[2:]}, as knn.py takes it: config.ks: got K = 200" in message
    message = failure(capsys, places, out, "--config.segmentation=nowhere")
    said = "config.segmentation=nowhere, as segmentation_linear.py takes it: no folder"
    assert said in message
    assert not out.exists()


@pytest.mark.slow  # trains three heads
def test_k_nn_and_segmentation_are_columns_beside(places, tmp_path, monkeypatch):
    """With the numbers that the protocols give for themselves, by the same settings."""
    for split, count in (("train", 3), ("val", 2)):
        for place, name in enumerate(("cat", "dog")):
            for i in range(count):
                file = tmp_path / f"classes/{split}/{name}/{i}.png"
                photos.save_noise(file, 60, 60, seed=10 * place + i)
    masks = scene_trees.own(tmp_path / "masks", train=5, val=3)
    own = {
        "knn": {"ks": "1", "resize": 56, "image_size": 56},
        "segmentation": {"crop": 24, "iterations": 3, "images_per_step": 4},
    }
    data = {"knn": tmp_path / "classes", "segmentation": masks}

    def smaller(name):
        module, get_config = artifacts.ALSO[name]

        def get_smaller():
            config = get_config()
            config.update(own[name])
            return config

        return module, get_smaller

    monkeypatch.setattr(artifacts, "ALSO", {name: smaller(name) for name in own})
    given = [f"--config.{name}={place}" for name, place in data.items()]
    given += ["--config.image_size=112", REMEDIES]
    assert run(places, tmp_path / "out", *given) == 0
    rows = results(tmp_path / "out")
    for row in rows:
        assert {"knn top1", "knn top5", "segmentation miou"} <= set(row["metrics"])
        assert set(row["intervals"]) == set(row["metrics"])
        assert row["evaluated"]["knn"]["images"] == 4
        assert row["evaluated"]["segmentation"]["images"] == 3
    assert "knn top1" in rows[1]["differences"]
    mious = [row["metrics"]["segmentation miou"] for row in rows]
    assert len(set(mious)) == 3  # the forward pass reaches the heads
    table = (tmp_path / "out/results.md").read_text()
    assert "| knn top1 (%) | segmentation miou (%) |" in table
    for name, protocol in (("knn", "knn"), ("segmentation", "segmentation_linear")):
        out = tmp_path / name
        settings = own[name] | {"data": data[name], "resamples": 50}
        settings |= {"remedies": REMEDIES.partition("=")[2], "remedy_images": 2}
        settings |= {"remedy_data": places / "data"}
        line = command(protocol, [places / "planted"], out, **settings)
        assert evaluate.main(line) == 0
        for alone, beside in zip(results(out), rows, strict=True):
            for kind in ("metrics", "intervals", "differences"):
                for metric, value in alone[kind].items():
                    assert beside[kind][f"{name} {metric}"] == value
