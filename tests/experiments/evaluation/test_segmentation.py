"""Segmentation from a folder to the results, with a tiny model."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import scene_trees
from evaluations import command, results, tiny_model
from experiments import evaluate
from experiments.evaluation import scene_training, segmentation, training
from sinder_jax import cli, vit
from sinder_jax.data import mosaics
from sinder_jax.evals import metrics

TINY = vit.ViTConfig(32, 2, 1, "mlp", img_size=28)
SMALL = {"crop": 24, "iterations": 6, "images_per_step": 4, "save_every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models"), TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scene_trees.own(tmp_path_factory.mktemp("data"), train=5, val=3)


def run(config, model, data, workdir, *, models=(), flags=(), **changes):
    changes = {**SMALL, "data": data, **changes}
    line = command(config, [model, *models], workdir, **changes)
    return evaluate.main([*line, *flags]), Path(workdir)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    code, out = run("segmentation_linear", model, data, tmp_path_factory.mktemp("out"))
    assert code == 0
    return out


def test_results_tell_what_was_evaluated(whole, model, data):
    (row,) = results(whole)
    assert (row["checkpoint"], row["protocol"]) == (str(model), "segmentation_linear")
    assert list(row["metrics"]) == ["miou", "macc", "aacc"]
    assert all(0 <= value <= 100 for value in row["metrics"].values())
    assert row["intervals"]["miou"][0] <= row["metrics"]["miou"]
    told = row["evaluated"]
    assert told["masks"] == "36 x 24 pixels, as they are"
    assert (told["training images"], told["images"], told["classes"]) == (5, 3, 3)
    assert (told["iterations"], told["learning rate"]) == (6, 0.001)
    assert list(row["iou"]) == ["0", "1", "2"]
    known = [value for value in row["iou"].values() if value is not None]
    assert row["metrics"]["miou"] == pytest.approx(np.mean(known))
    assert "learning rate: 0.001" in (whole / "results.md").read_text()
    (picture,) = (whole / "pictures").iterdir()
    with Image.open(picture) as image:
        assert min(image.size) > 300


def test_the_multiscale_protocol_runs_to_its_end(model, data, tmp_path):
    changes = {"blocks": 2, "ratios": "1.0,1.32", "seeds": 2, "raw_colors": "true"}
    changes |= {"iterations": 2, "resamples": 50}
    models = [shutil.copytree(model, tmp_path / "copy")]
    out = tmp_path / "out"
    code, _ = run("segmentation_multiscale", model, data, out, models=models, **changes)
    first, second = results(out)
    assert code == 0 and first["metrics"] == second["metrics"]
    assert second["difference_intervals"]["miou"] == [0, 0]
    assert {"miou", "raw_color_miou"} < set(first["metrics"])
    assert first["evaluated"]["flip"] and first["evaluated"]["seeds"] == 2


@pytest.mark.parametrize(
    ("tree", "title", "named"),
    [
        pytest.param(
            scene_trees.cityscapes,
            "Cityscapes",
            (27, "road", "bicycle"),
            marks=pytest.mark.slow,
        ),
        (
            scene_trees.potsdam,
            "Potsdam-3",
            (3, "roads and cars", "vegetation and trees"),
        ),
    ],
)
def test_published_trees_are_evaluated(model, tmp_path, capfd, tree, title, named):
    data, out = tree(tmp_path / "data"), tmp_path / "out"
    code, _ = run("segmentation_linear", model, data, out, iterations=1)
    assert code == 0
    (row,) = results(out)
    assert row["evaluated"]["data"] == f"{title}, incomplete"
    names = list(row["iou"])
    assert (len(names), names[0], names[-1]) == named
    assert f"{title} has " in capfd.readouterr().err


def test_a_killed_evaluation_goes_on_with_the_same_bits(
    whole, model, data, tmp_path, monkeypatch
):
    """Stopped in the training, killed after it, and between two files of areas."""
    taken = []
    make_step = scene_training.segmentation.make_step

    def counting(options, sharding):
        step = make_step(options, sharding)

        def counted(*args):
            taken.append(1)
            if len(taken) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        return counted

    monkeypatch.setattr(scene_training.segmentation, "make_step", counting)
    code, _ = run("segmentation_linear", model, data, tmp_path)
    assert (code, len(taken)) == (75, 3)
    monkeypatch.setattr(segmentation, "AT_ONCE", 2)
    predicted = []

    def killed(job, source, state, part):
        for each in predictions(job, source, state, part):
            predicted.append(1)
            if len(predicted) == 3:
                raise KeyboardInterrupt
            yield each

    predictions = segmentation.predictions
    monkeypatch.setattr(segmentation, "predictions", killed)
    with pytest.raises(KeyboardInterrupt):
        run("segmentation_linear", model, data, tmp_path)
    assert len(taken) == 6
    (kept,) = tmp_path.glob("states/*/seed0/areas_*.npz")
    code, _ = run("segmentation_linear", model, data, tmp_path)
    assert len(taken) == 6 and code == 0
    assert len(predicted) == 4 + 3  # one image was left; three are drawn
    assert results(tmp_path) == results(whole)
    for name in ("results.md", "results.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_damaged_areas_are_computed_again(whole, model, data, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    (kept,) = out.glob("states/*/seed0/areas_*.npz")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    (out / "results.json").unlink()
    run("segmentation_linear", model, data, out)
    assert results(out) == results(whole)


@contextlib.contextmanager
def touched(path):
    """As if another file were there, until the end of the block."""
    stamp = path.stat()
    os.utime(path, (0, 0))
    yield
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_other_files_in_the_same_place_are_noticed(whole, model, data, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    with touched(data / "train/masks/0.png"):
        with pytest.raises(ValueError, match="training with another training images"):
            run("segmentation_linear", model, data, out)
    with touched(data / "val/images/0.jpg"):  # evaluated again by the same head
        run("segmentation_linear", model, data, out)
    assert len(list(out.glob("states/*/seed0/areas_*.npz"))) == 2
    assert results(out) == results(whole)


def test_a_new_head_is_evaluated_anew(model, tmp_path):
    """After other training masks, with one more class, in both ways out."""
    data = scene_trees.own(tmp_path / "data", train=5, val=3)
    name, out, other = "segmentation_linear", tmp_path / "out", tmp_path / "other"
    changes = {"iterations": 2, "resamples": 0, "pictures": 0}
    run(name, model, data, out, **changes)
    before = results(out)
    for path in (data / "train/masks").iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        mask[mask < 255] = (mask[mask < 255] + 1) % 4
        Image.fromarray(mask).save(path)
    said = refused(name, model, data, out, **changes)
    assert "another classes, training images: add --overwrite" in said
    shutil.copytree(out, other)
    (head,) = out.glob("states/*/seed0/head")
    shutil.rmtree(head)
    run(name, model, data, out, **changes)
    run(name, model, data, other, flags=["--overwrite"], **changes)
    assert results(out) == results(other) != before
    assert len(results(out)[0]["iou"]) == 4


def test_what_is_only_reported_may_change(whole, model, data, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(training, "_loop", None)  # calling it would raise
    monkeypatch.setattr(segmentation, "_areas", None)
    changes = {"resamples": 7, "pictures": 0, "save_every": 9}
    for flags in ([], ["--overwrite"]):  # which only removes what cannot be used
        run("segmentation_linear", model, data, out, flags=flags, **changes)
    assert results(out)[0]["metrics"] == results(whole)[0]["metrics"]


def test_any_number_of_devices_gives_the_same_results(
    whole, model, data, tmp_path, monkeypatch
):
    devices, before = jax.devices(), results(whole)
    for count in (n for n in (1, 2, 3, 4) if n < len(devices)):
        monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
        _, out = run("segmentation_linear", model, data, tmp_path / str(count))
        assert results(out) == before, count


@pytest.mark.slow
def test_four_devices_give_the_results_of_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "any_number"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(("count", "per_step"), [(10, 4), (8, 4), (5, 5)])
def test_each_pass_takes_every_scene_at_most_once(count, per_step):
    whole_steps = count // per_step * per_step
    orders = [
        [
            scene_training.scene_of(i, count, per_step, 0)
            for i in range(n, n + whole_steps)
        ]
        for n in (0, whole_steps)
    ]
    assert all(len(set(order)) == whole_steps for order in orders)
    assert orders[0] != orders[1]
    if count % per_step:  # the next pass may take what this one has dropped
        assert set(orders[0]) != set(range(count))


def test_areas_are_those_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    masks, classes = rng.integers(0, 4, (2, 5, 9, 9))
    matrices = [
        metrics.confusion_matrix(m, c, 4) for m, c in zip(masks, classes, strict=True)
    ]
    areas = [[x.diagonal(), x.sum(1), x.sum(0)] for x in matrices]
    scores = segmentation.score([""], np.sum(areas, axis=0)[None], 5)
    want = metrics.segmentation_scores(sum(matrices))
    assert scores["miou"] == pytest.approx(100 * want.miou, rel=1e-12)


# --- Mistakes -------------------------------------------------------------------------


def refused(*args, **changes):
    """The one line that a command ends with, before anything is computed."""
    try:
        run(*args, **changes)
    except cli.USER_ERRORS as error:
        return cli.one_line(error)
    raise AssertionError("no error")


def test_mistakes_are_told_in_one_line(model, data, tmp_path):
    name, out = "segmentation_linear", tmp_path / "out"
    told = {
        "no data given": {"data": ""},
        "no folder": {"data": tmp_path / "nowhere"},
        "got the label 2, expected 0 to 1": {"num_classes": 2},
        "got 5 training images, expected at least the 6": {"images_per_step": 6},
        "config.blocks: got the last 3 blocks": {"blocks": 3},
        "config.mode": {"mode": "slid"},
        "config.num_classes: got 9, but sample:mosaics has 8": {
            "data": "sample:mosaics",
            "num_classes": 9,
        },
    }
    for said, changes in told.items():
        assert said in refused(name, model, changes.pop("data", data), out, **changes)
    assert not out.exists()


def test_masks_of_0_and_255_are_no_two_classes(model, tmp_path):
    data = scene_trees.own(tmp_path, classes=1)
    said = refused("segmentation_linear", model, data, tmp_path / "out")
    assert "the largest label is 0, which makes 1 classes" in said


@pytest.mark.parametrize(
    ("split", "said"), [("train", "training masks"), ("val", "validation masks")]
)
def test_masks_without_a_class_are_told(model, tmp_path, split, said):
    data = scene_trees.own(tmp_path)
    for path in (data / split / "masks").iterdir():
        Image.fromarray(np.full((24, 36), 255, np.uint8)).save(path)
    told = refused("segmentation_linear", model, data, tmp_path / "out")
    assert f"no pixel of the {said} has a class" in told


def test_a_training_that_diverges_is_told(model, data, tmp_path):
    said = refused("segmentation_linear", model, data, tmp_path / "out", lr=1e38)
    assert "diverged" in said and "smaller --config.lr than 1e+38" in said


# --- The trained model ----------------------------------------------------------------


@pytest.mark.real
def test_a_trained_model_is_clearly_above_raw_colors(tmp_path):
    from real import backbone

    code = evaluate.main(
        [
            "--config=segmentation_linear.py",
            f"--checkpoint={backbone()}",
            f"--workdir={tmp_path}",
            "--config.data=sample:mosaics",
            "--config.raw_colors=true",
        ]
    )
    (row,) = results(tmp_path)
    assert code == 0 and len(row["iou"]) == len(mosaics.classes())
    intervals = row["intervals"]
    assert intervals["miou"][0] > intervals["raw_color_miou"][1] + 10
