"""The protocol `linear` from its command line, on class folders made on the spot."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import real
from benchmarks import synthetic
from evaluations import command, results
from experiments import evaluate
from experiments.evaluation import linear as protocol
from experiments.evaluation.progress import Progress
from samples import error_of
from sinder_jax import checkpoint, cli, vit
from sinder_jax.evals import linear

TINY = vit.ViTConfig(32, 4, 1, "mlp", img_size=28)
COLORS = {"blue": (20, 20, 220), "green": (20, 220, 20), "red": (220, 20, 20)}
SHORT = {
    "resize": 32,
    "image_size": 28,
    "iterations": 12,
    "images_per_step": 8,
    "save_every": 5,
    "evaluate_every": 6,
    "learning_rates": "0.1,1,10",
    "seeds": 2,
    "batch_size": 2,
    "read_threads": 1,
    "resamples": 20,
}


def save_color(path, color, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 40, (40, 50, 3))
    pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a checkpoint `tiny` and class folders `data`."""
    folder = tmp_path_factory.mktemp("given")
    checkpoint.save(folder / "tiny", TINY, synthetic.random_params(TINY))
    for split, count in (("train", 6), ("val", 5)):
        for number, (name, color) in enumerate(COLORS.items()):
            for i in range(count):
                path = folder / "data" / split / name / f"{i}.png"
                save_color(path, color, 100 * number + i + 10 * len(split))
    return folder


def linear_command(given, out, **changes):
    settings = {"data": given / "data", **SHORT, **changes}
    return command("linear", [given / "tiny"], out, **settings)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate.main(linear_command(given, out)) == 0
    return out


def test_the_best_head_and_that_of_each_kind_are_reported(whole):
    (row,) = results(whole)
    assert row["protocol"] == "linear"
    kinds = ["1_cls", "1_cls_mean", "4_cls", "4_cls_mean"]
    names = [
        f"top{k}{kind}" for kind in ["", *(f"_{x}" for x in kinds)] for k in (1, 5)
    ]
    assert list(row["metrics"]) == names
    best = [row["metrics"][f"top1_{kind}"] for kind in kinds]
    # The mean over seeds of each one's best; colors are easy, and chance is 33.
    assert row["metrics"]["top1"] >= max(best) > 80
    assert row["metrics"]["top5"] == 100  # of three classes
    table = (whole / "results.md").read_text()
    assert all(f"top1_{kind} (%)" in table for kind in kinds)
    told = row["evaluated"]
    assert (told["images"], told["training images"], told["classes"]) == (15, 18, 3)
    assert " at base learning rate " in told["best head"]


def test_right_means_that_no_class_is_preferred():
    """Heads that always say class 0, then 1, then 2 ..."""
    state = {}
    for kind in linear.KINDS:
        heads = linear.init(jax.random.key(0), 2 * sum(kind), 8, [0.1])
        bias = -jnp.arange(8, dtype=jnp.float32)[None]
        made = heads.replace(kernel=jnp.zeros_like(heads.kernel), bias=bias)
        state[protocol.name_of(kind)] = made
    found = protocol.evaluate(state, np.ones((8, 5, 2), np.float32), np.arange(8))
    assert found.arrays["top1"].tolist() == [[1] + 7 * [0]] * 4
    assert found.arrays["top5"].tolist() == [5 * [1] + 3 * [0]] * 4
    assert found.summary == {"top1": 12.5}


def test_each_seed_trains_heads_of_its_own(whole):
    (row,), found = results(whole), heads(whole)
    assert row["evaluated"]["seeds"] == 2
    assert sorted(found) == ["seed_0", "seed_1"] and found["seed_0"] != found["seed_1"]
    low, high = row["intervals"]["top1"]
    assert low <= row["metrics"]["top1"] <= high


def test_a_stopped_evaluation_resumes_to_the_same_results(
    given, whole, tmp_path, monkeypatch
):
    out, at = tmp_path / "out", Progress.at

    def stop_at(self, done, note=""):
        if note and done == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        at(self, done, note)

    monkeypatch.setattr(Progress, "at", stop_at)
    assert evaluate.main(linear_command(given, out)) == cli.TRY_AGAIN
    assert not (out / "results.json").exists()
    monkeypatch.setattr(Progress, "at", at)
    assert evaluate.main(linear_command(given, out)) == 0
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert heads(out) == heads(whole)


def heads(out):
    """The heads of each seed after the last step, as bytes."""
    (states,) = (out / "states").iterdir()
    newest = {x.name: checkpoint.load_newest(x) for x in states.iterdir()}
    return {
        name: jax.tree.map(lambda x: x.tobytes(), each.tree["state"])
        for name, each in newest.items()
    }


def test_one_device_gives_the_same_heads_as_two(given, whole, tmp_path, monkeypatch):
    assert len(jax.devices()) > 1
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    assert evaluate.main(linear_command(given, tmp_path / "out")) == 0
    assert heads(tmp_path / "out") == heads(whole)
    assert results(tmp_path / "out") == results(whole)


@pytest.mark.slow
def test_four_devices_give_the_same_heads(given, whole, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    line = [sys.executable, "-m", "experiments.evaluate"]
    ended = subprocess.run(
        [*line, *linear_command(given, tmp_path / "out")], env=os.environ | flags
    )
    assert ended.returncode == 0
    assert heads(tmp_path / "out") == heads(whole)
    assert results(tmp_path / "out") == results(whole)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rates": "0.1,x"}, "config.learning_rates: got '0.1,x'"),
        ({"learning_rates": "-1"}, "config.learning_rates: got '-1'"),
        ({"learning_rates": "1e-60"}, "config.learning_rates: got '1e-60'"),
        ({"iterations": -1}, "config.iterations: got -1"),
        ({"seeds": 0}, "config.seeds: got 0"),
        ({"resize": 14}, "config.resize: got 14"),
        ({"resize": 1_000_000}, "to 4096 pixels"),
        ({"image_size": 30, "resize": 30}, "config.image_size: got 30"),
    ],
)
def test_numbers_out_of_range_are_refused(given, tmp_path, changes, told):
    message = error_of(
        evaluate.main, linear_command(given, tmp_path / "out", **changes)
    )
    assert told in message
    assert not (tmp_path / "out").exists()


def test_an_unreadable_training_image_is_named(given, tmp_path):
    broken = tmp_path / "data"
    for split in ("train", "val"):
        for name, color in list(COLORS.items())[:2]:
            save_color(broken / split / name / "a.png", color, 0)
    (broken / "train" / "red").mkdir()
    (broken / "train" / "red" / "b.png").write_bytes(b"no image")
    message = error_of(
        evaluate.main, linear_command(given, tmp_path / "out", data=broken)
    )
    assert "train/red/b.png" in message


@pytest.mark.real
def test_a_trained_model_knows_which_photograph_a_crop_is_from(tmp_path):
    out = tmp_path / "out"
    assert (
        evaluate.main(
            [
                "--config=linear.py",
                f"--checkpoint={real.backbone()}",
                "--config.data=sample:crops",
                f"--workdir={out}",
            ]
        )
        == 0
    )
    (row,) = results(out)
    assert row["metrics"]["top1"] > 95  # 100.0 found
    assert row["evaluated"]["iterations"] == 30
