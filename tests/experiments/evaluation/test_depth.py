"""The protocol `depth` from its command line, on a small tree like NYU Depth v2's."""

import os
import signal
import types

import jax
import numpy as np
import pytest

import nyu_tree
from benchmarks import synthetic
from evaluations import command, results
from experiments import evaluate
from experiments.evaluation import depth as protocol
from experiments.evaluation.progress import Progress
from samples import error_of
from sinder_jax import checkpoint, cli, vit
from sinder_jax.evals import depth

TINY = vit.ViTConfig(16, 4, 1, "mlp", img_size=28)
SHORT = {
    "iterations": 6,
    "images_per_step": 2,
    "evaluate_every": 3,
    "save_every": 2,
    "lr": 0.01,
    "read_threads": 1,
    "resamples": 20,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a checkpoint `tiny` and a tree `nyu`."""
    folder = tmp_path_factory.mktemp("given")
    checkpoint.save(folder / "tiny", TINY, synthetic.random_params(TINY))
    nyu_tree.write(folder / "nyu")
    return folder


def depth_command(given, out, **changes):
    settings = {"data": given / "nyu", **SHORT, **changes}
    return command("depth", [given / "tiny"], out, **settings)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate.main(depth_command(given, out)) == 0
    return out


def test_errors_are_reported_in_meters(whole):
    (row,) = results(whole)
    assert row["protocol"] == "depth"
    assert list(row["metrics"]) == list(protocol.METRICS)
    assert 0 < row["metrics"]["rmse"] < 5
    assert row["evaluated"]["images"] == 2
    assert row["evaluated"]["rmse where abs_rel was least"].endswith(" iterations")
    assert "Lower is better" in (whole / "results.md").read_text()


def test_a_stopped_training_resumes_on_another_number_of_devices(
    given, whole, tmp_path, monkeypatch
):
    out, at = tmp_path / "out", Progress.at

    def stop_at(self, done, note=""):
        if note and done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        at(self, done, note)

    monkeypatch.setattr(Progress, "at", stop_at)
    assert evaluate.main(depth_command(given, out)) == cli.TRY_AGAIN
    monkeypatch.setattr(Progress, "at", at)
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    assert evaluate.main(depth_command(given, out)) == 0
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_the_mirrored_image_gets_the_mirrored_depth():
    def extract(images):  # the mean color of each patch
        count, height, width, _ = images.shape
        return images.reshape(count, height // 14, 14, width // 14, 14, 3).mean((2, 4))

    data = types.SimpleNamespace(options=depth.Options())
    job = types.SimpleNamespace(model=types.SimpleNamespace(config=TINY), data=data)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    state = depth.init(jax.random.key(0), 3)
    (one,) = protocol.predict(job, extract, state, [image])
    (other,) = protocol.predict(job, extract, state, [image[:, ::-1]])
    assert one.shape == (48, 64) and not np.array_equal(one, other)
    assert np.array_equal(one, other[:, ::-1])


def test_an_image_without_a_known_pixel_is_left_out_of_the_mean():
    scores = np.array([[1.0] * 9, [np.nan] * 9, [3.0] * 9])
    counts = protocol._counts(scores)
    assert protocol.score(counts.sum(axis=0), 3) == dict.fromkeys(protocol.METRICS, 2)


def test_the_best_evaluation_is_that_with_the_least_abs_rel():
    history = {
        10: {"abs_rel": 0.3, "rmse": 0.1},
        20: {"abs_rel": 0.1, "rmse": 0.4},
        30: {"abs_rel": None, "rmse": None},
    }
    assert protocol.best(history) == "0.400 m after 20 iterations"


def test_a_training_that_diverges_is_an_error(given, tmp_path):
    short = {"iterations": 2, "evaluate_every": 1, "lr": 1e30}
    message = error_of(
        evaluate.main,
        depth_command(given, tmp_path / "out", **short),
        kind=FloatingPointError,
    )
    assert "diverged after" in message and "smaller --config.lr than 1e+30" in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": 2}, "layers=2, expected 1 or 4"),
        ({"images_per_step": 3}, "config.images_per_step: got 3"),
        ({"iterations": 0}, "config.iterations: got 0"),
        ({"max_depth": 0.0}, "max_depth=0.0"),
        ({"max_depth": 0.01}, "nyu_test.txt has a pixel between config.min_depth and"),
        ({"lr": -1.0}, "config.lr: got -1.0"),
        ({"batch_size": 0}, "config.batch_size: got 0"),
        ({"data": ""}, "no data given"),
    ],
)
def test_settings_out_of_range_are_refused(given, tmp_path, changes, told):
    assert told in error_of(
        evaluate.main, depth_command(given, tmp_path / "out", **changes)
    )
    assert not (tmp_path / "out").exists()
