"""STEGO from a folder to the results, with a tiny model."""

import functools
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import scene_trees
import small_runs
from evaluations import command, results, tiny_model
from experiments import evaluate
from experiments.configs import evals
from experiments.configs.evals import stego_cityscapes, stego_potsdam3
from experiments.evaluation import (
    stego,
    stego_batches,
    stego_settings,
    stego_training,
    training,
    unsupervised,
)
from sinder_jax import checkpoint, cli, vit
from sinder_jax import model as models

TINY = vit.ViTConfig(32, 2, 1, "mlp", img_size=28)
SMALL = {
    "train_size": 28,
    "test_size": 42,
    "crops": "none",
    "iterations": 6,
    "images_per_step": 4,
    "samples": 3,
    "dim": 5,
    "lr": 0.05,
    "save_every": 3,
    "pictures": 2,
    "backbone": "dinov2",
}
NAME = "stego_cityscapes"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models"), TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scene_trees.own(tmp_path_factory.mktemp("data"), train=9, val=3)


def run(model, data, workdir, *, config=NAME, more=(), flags=(), **changes):
    changes = {**SMALL, "data": data, **changes}
    line = command(config, [model, *more], workdir, **changes)
    return evaluate.main([*line, *flags]), Path(workdir)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    code, out = run(model, data, tmp_path_factory.mktemp("out"), seeds=2)
    assert code == 0
    return out


# --- Results --------------------------------------------------------------------------


def test_results_tell_what_was_evaluated(whole, model):
    (row,) = results(whole)
    assert (row["checkpoint"], row["protocol"]) == (str(model), NAME)
    kinds = ("cluster", "linear", "cluster_raw", "linear_raw")
    for kind in (*kinds, *(f"{each}_last" for each in kinds)):
        assert 0 <= row["metrics"][f"{kind}_miou"] <= 100
    told = row["evaluated"]
    assert (told["row of Table 7"], told["weights"]) == ("dinov2", "0.9 0.6 1")
    assert told["shifts"] == "0.3 0.2 0.45"
    assert (told["code"], told["iterations"], told["seeds"]) == (5, 6, 2)
    assert "the best by the labels of these images" in told["state"]
    assert len(row["by_seed"]) == 2
    assert (whole / "pictures").is_dir()


def test_the_state_that_is_best_on_the_validation_images_is_taken(whole):
    """Of evaluations after 2, 4 and 6 steps, the first of the best."""
    (row,) = results(whole)
    chosen = row["evaluated"]["state"].split()[1:4:2]
    for seed, steps in enumerate(chosen):
        (folder,) = whole.glob(f"states/*/dinov2_seed{seed}")
        newest = checkpoint.load_newest(folder)
        history = newest.metadata["history"]
        assert list(history) == ["2", "4", "6"]
        scores = {int(n): each["cluster_miou"] for n, each in history.items()}
        assert int(steps) == min(n for n in scores if scores[n] == max(scores.values()))


@pytest.mark.slow
def test_the_potsdam_protocol_takes_several_rows(model, data, tmp_path):
    """And overridden numbers; the same model twice, by two rows."""
    copy = shutil.copytree(model, tmp_path / "copy")
    changes = {"iterations": 2, "crf": "false", "pictures": 0, "resamples": 0}
    changes |= {"backbone": "dinov2,sinder", "weights": "1,2,3", "baselines": "true"}
    _, out = run(
        *(model, data, tmp_path / "out"),
        config="stego_potsdam3",
        more=[copy],
        **changes,
    )
    first, second = (row["evaluated"] for row in results(out))
    assert (first["shifts"], second["shifts"]) == ("0.3 0.2 0.45", "0.4 0.45 0.45")
    assert first["weights"] == second["weights"] == "1 2 3"
    assert "kmeans_tokens_miou" in results(out)[0]["metrics"]


# --- Kill and resume ------------------------------------------------------------------


def test_a_killed_training_goes_on_with_the_same_bits(
    whole, model, data, tmp_path, monkeypatch
):
    """Stopped between two evaluations, then killed after a best state was kept."""
    taken = []
    make_step = stego_training.stego.make_step

    def counting(options):
        step = make_step(options)

        def counted(*args):
            taken.append(1)
            if len(taken) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        return counted

    monkeypatch.setattr(stego_training.stego, "make_step", counting)
    assert run(model, data, tmp_path, seeds=2)[0] == 75
    kept = stego_training.Best.keep

    def killed(self, params, step, score):
        kept(self, params, step, score)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stego_training.Best, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, data, tmp_path, seeds=2)
    assert run(model, data, tmp_path, seeds=2)[0] == 0
    assert len(taken) == 3 + 1 + 3 + 6  # step 4 twice
    assert results(tmp_path) == results(whole)
    for pattern in ("states/*/*_best_*.npz", "pictures/*", "results.md"):
        ours, theirs = (sorted(x.glob(pattern)) for x in (tmp_path, whole))
        assert [x.name for x in ours] == [x.name for x in theirs]
        assert [x.read_bytes() for x in ours] == [x.read_bytes() for x in theirs]


@pytest.mark.slow
def test_a_damaged_best_state_is_told(whole, model, data, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    kept, _ = out.glob("states/*/dinov2_seed*_best_*.npz")
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(training.Unusable, match="whose best state, .* is lost"):
        run(model, data, out, seeds=2)
    run(model, data, out, seeds=2, flags=["--overwrite"])
    assert results(out) == results(whole)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_results(
    whole, model, data, tmp_path, monkeypatch
):
    devices = jax.devices()
    assert len(devices) > 1
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: devices[:1])
    _, out = run(model, data, tmp_path, seeds=2)
    assert results(out) == results(whole)


# --- Batches --------------------------------------------------------------------------


def test_a_positive_is_one_of_the_neighbors_1_to_7():
    neighbors = np.arange(40 * 30, dtype=np.int32).reshape(40, 30)
    pairs = [stego_batches.pair(i, neighbors, 8, seed=1) for i in range(4_000)]
    which = [positive - 30 * image for image, positive in pairs]
    counts = np.bincount(which, minlength=30)
    assert not counts[0] and not counts[8:].any()
    assert (abs(counts[1:8] - 4_000 / 7) < 100).all()
    assert sorted(image for image, _ in pairs[:40]) == list(range(40))
    assert pairs[:40] != [stego_batches.pair(i, neighbors, 8, 2) for i in range(40)]


def test_a_batch_holds_its_images_tokens_and_masks(model, data):
    config = settings(data, **SMALL)
    shared = stego.prepare(config, [models.open_checkpoint(model)])
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(9, 2, 2, 4)).astype(np.float16)
    neighbors = np.stack([rng.permutation(9) for _ in range(9)]).astype(np.int32)
    take = functools.partial(
        *(stego_batches.batches, shared.train, tokens, neighbors, shared.config, 3)
    )
    batches = list(take(first=0))
    assert len(batches) == 6 and batches[0].features.dtype == np.float32
    masks = unsupervised.masks_of(shared.train, config, 28)
    for number, batch in enumerate(batches):
        for i in range(4):
            image, positive = stego_batches.pair(4 * number + i, neighbors, 4, 3)
            assert np.array_equal(batch.features[i], tokens[image])
            assert np.array_equal(batch.positives[i], tokens[positive])
            assert np.array_equal(batch.labels[i], masks[image])
    later = list(take(first=4))
    assert np.array_equal(later[0].positives, batches[4].positives)


@pytest.mark.parametrize(
    "images, want", [(14_875, 100), (6_400, 100), (6_399, 399), (4_545, 284), (16, 1)]
)
def test_evaluations_are_as_often_as_the_originals(images, want):
    config = stego_cityscapes.get_config()
    config.images_per_step = 16
    assert stego_settings.evaluate_every(config, images) == want


# --- Settings -------------------------------------------------------------------------


def settings(data, **changes):
    config = stego_cityscapes.get_config()
    config.update({"data": str(data), **changes})
    return config


def test_the_published_numbers_stand_for_0(model, data):
    opened = models.open_checkpoint(model)
    for file, crops in ((stego_cityscapes, 45), (stego_potsdam3, 9)):
        config = file.get_config()
        config.update({"data": str(data), "backbone": "sinder", "images_per_step": 8})
        filled = stego.prepare(config, [opened])
        assert len(filled.train) == crops
        found = filled.config
        assert (found.train_size, found.test_size) == (392, 560)
        assert (found.iterations, found.lr, found.probe_lr) == (5_000, 5e-4, 5e-3)
        options = stego_settings.options(found, "sinder")
        assert (options.samples, options.dropout, found.dim) == (11, 0.1, 70)
        assert options.negatives == 5 and options.pointwise
    assert options.row == stego.stego.TABLE["potsdam3", "sinder"]
    assert stego_settings.PUBLISHED[config.protocol]["images_per_step"] == 16
    assert set(evals.unsupervised()) < set(config)


def with_registers(count):
    config = vit.ViTConfig(32, 2, 1, "mlp", img_size=28, num_register_tokens=count)
    return models.Model.of(config, small_runs.weights(config))


def refused(*args, **changes):
    """The one line that a command ends with, before anything is computed."""
    try:
        run(*args, **changes)
    except cli.USER_ERRORS as error:
        return cli.one_line(error)
    raise AssertionError("no error")


def test_mistakes_are_told_in_one_line(model, data, tmp_path):
    out, few = tmp_path / "out", scene_trees.own(tmp_path / "few", train=7)
    told = {
        "config.backbone: got '', expected dinov2, dinov2_reg, sinder": {
            "backbone": ""
        },
        "config.backbone: got 'dino'": {"backbone": "dino"},
        "got 2 for 1 checkpoints": {"backbone": "dinov2,sinder"},
        "a model with 0 registers": {"backbone": "dinov2_reg"},
        "config.weights: got '1,2', expected three": {"weights": "1,2"},
        "config.shifts: got '1,2,nan'": {"shifts": "1,2,nan"},
        "got samples=0, must be at least 1": {"samples": 0},
        "config.dim: got 4097, expected at most 4096": {"dim": 4_097},
        "got lr=-1.0": {"lr": -1},
        "config.dim: got 0": {"dim": 0},
        "config.iterations: got -1": {"iterations": -1},
        "config.images_per_step: got 1": {"images_per_step": 1},
        "got 9 training images, expected at least the 10": {"images_per_step": 10},
        "got 7 training images, expected at least 8": {"data": few},
        "config.train_size": {"train_size": 30},
    }
    for said, changes in told.items():
        assert said in refused(model, changes.pop("data", data), out, **changes)
    assert not out.exists()


def test_a_backbone_must_not_contradict_the_model():
    plain, registers = with_registers(0), with_registers(4)
    assert unsupervised.backbones("dinov2, dinov2_reg", [plain, registers]) == [
        "dinov2",
        "dinov2_reg",
    ]
    assert unsupervised.backbones("sinder", [plain, registers]) == ["sinder"] * 2
    for name, model in (("dinov2", registers), ("dinov2_reg", plain)):
        with pytest.raises(ValueError, match=f"got {name} for .* registers"):
            unsupervised.backbones(name, [model])
