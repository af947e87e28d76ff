"""CAUSE-TR from a folder to the results, with a tiny model."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import scene_trees
from evaluations import command, results, tiny_model
from experiments import evaluate
from experiments.configs.evals import cause_cityscapes, cause_voc
from experiments.evaluation import cause, cause_settings
from experiments.evaluation.cause_batches import Order
from samples import error_of
from sinder_jax import vit

TINY = vit.ViTConfig(16, 2, 1, "mlp", img_size=28)
SMALL = {
    "crops": "none",
    "train_size": 56,
    "test_size": 56,
    "gpus": 1,
    "images_per_step": 3,
    "mediator_epochs": 2,
    "front_door_epochs": 2,
    "fine_tuning_epochs": 2,
    "codes": 6,
    "bank_size": 3,
    "crf": "False",
    "save_every": 3,
    "resamples": 0,
    "pictures": 1,
}
CONFIGS = {"cause_cityscapes": cause_cityscapes, "cause_voc": cause_voc}
STEPS = 4  # of a stage: five images, three a step, two epochs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models"), TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scene_trees.own(tmp_path_factory.mktemp("data"), train=5, val=3)


def run(model, data, workdir, **changes):
    changes = {**SMALL, "data": data, **changes}
    line = command("cause_cityscapes", [model], workdir, **changes)
    return evaluate.main(line), Path(workdir)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    code, out = run(model, data, tmp_path_factory.mktemp("out"))
    assert code == 0
    return out


def test_results_tell_what_was_trained(whole):
    (row,) = results(whole)
    assert row["protocol"] == "cause_cityscapes"
    assert {"cluster_miou", "cluster_acc", "cluster_map", "linear_miou"} <= set(
        row["metrics"]
    )
    told = row["evaluated"]
    assert told["label leak"] == "no: labels train the linear probe alone"
    assert told["steps of the stages"] == "4, 4, 4"
    assert told["learning rate"] == "0.001 x 1 GPUs"
    assert (told["clip"], told["weight decay"]) == (1.0, 0.0)
    assert len(list((whole / "pictures").iterdir())) == 1


def test_only_the_results_of_the_stages_are_kept(whole):
    """Snapshots of the second hold the bank, 1.7 GB of the published size."""
    (folder,) = (whole / "states").iterdir()
    kept = [path.name.rpartition("_")[0] for path in folder.glob("*.npz")]
    assert sorted(kept) == [f"seed0_{stage}" for stage in sorted(cause_settings.STAGES)]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["seed0"]


@pytest.mark.slow
def test_the_leak_is_a_flag_that_changes_the_clusters_head(
    whole, model, data, tmp_path
):
    code, out = run(model, data, tmp_path, label_leak=True)
    assert code == 0
    (row,) = results(out)
    told = row["evaluated"]["label leak"]
    assert told.startswith("yes, as in the released third stage")

    def arrays(folder, stage):
        (path,) = folder.glob(f"states/*/seed0_{stage}_*.npz")
        with np.load(path) as file:
            return file["result"].tobytes()

    assert arrays(whole, "front_door") == arrays(out, "front_door")
    assert arrays(whole, "fine_tuning") != arrays(out, "fine_tuning")


def test_a_start_after_a_stop_in_each_stage_gives_the_same_bits(
    whole, model, data, tmp_path, monkeypatch
):
    """Stopped by a signal after the second step of each stage."""
    taken = []

    def stopping(make):
        def making(*args, **kwargs):
            step, name = make(*args, **kwargs), make.__qualname__

            def counted(*given):
                taken.append(name)
                if taken.count(name) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(*given)

            return counted

        return making

    for module, name in (
        (cause.cause, "make_codebook_step"),
        (cause.front_door, "make_step"),
        (cause.cause, "make_fine_tuning_step"),
    ):
        monkeypatch.setattr(module, name, stopping(getattr(module, name)))
    codes = [run(model, data, tmp_path)[0] for _ in range(4)]
    assert codes == [75, 75, 75, 0]
    assert len(taken) == 3 * STEPS  # none was taken twice
    assert results(tmp_path) == results(whole)
    for name in ("results.md", "results.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"test_size": 70}, "got 56 and 70, expected the same"),
        ({"train_size": 42, "test_size": 42}, "got 42, expected at least 56"),
        ({"codes": 1}, "config.codes: got 1, expected at least 2"),
        ({"codes": 99_999_999}, "got 99999999 and 3, a bank of 2,458 GB"),
        ({"gpus": -1}, "config.gpus: got -1, expected at least 1"),
        ({"gpus": 6}, "config.gpus: got 6 for 5 training images"),
        ({"mediator_epochs": -1}, "config.mediator_epochs: got -1"),
        ({"lr": -1.0}, "config.lr: got -1.0, expected above 0"),
        ({"clip": -1.0}, "config.clip: got -1.0, expected at least 0"),
        ({"thresholds": "0.3"}, "config.thresholds: got '0.3', expected two cosines"),
        ({"thresholds": "0.1,0.3"}, "config.thresholds: got '0.1,0.3', expected two"),
        ({"thresholds": "nan,0.3"}, "config.thresholds: got 'nan,0.3', expected two"),
        ({"images_per_step": 9}, "got 5 training images, expected at least the 9"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, data, tmp_path, changes, said):
    assert said in error_of(run, model, data, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


# --- Schedule -------------------------------------------------------------------------


def published(name, gpus):
    config = CONFIGS[name].get_config()
    config.update({**cause_settings.PUBLISHED[name], "gpus": gpus})
    return config


@pytest.mark.parametrize(
    "name, crops, gpus, steps",
    [
        ("cause_cityscapes", 14_875, 4, 233),
        ("cause_cityscapes", 14_875, 1, 930),
        ("cause_voc", 73_200, 4, 1_144),
        ("cause_voc", 73_200, 1, 4_575),
    ],
)
def test_steps_and_rates_are_those_of_the_original(name, crops, gpus, steps):
    config = published(name, gpus)
    assert cause_settings.order(config, crops, 0).steps == steps
    options = {
        stage: cause_settings.options(config, stage, steps)
        for stage in cause_settings.STAGES
    }
    assert {each.lr for each in options.values()} == {1e-3 * gpus}
    assert options["fine_tuning"].halve_every == 2 * steps
    assert options["front_door"].halve_every == 0
    decay, clip = (0.0, 1.0) if name == "cause_cityscapes" else (1e-4, 0.0)
    for stage in ("front_door", "fine_tuning"):
        assert (options[stage].weight_decay, options[stage].clip) == (decay, clip)
    assert options["mediator"].weight_decay == options["mediator"].clip == 0


def test_each_epoch_sees_a_share_of_its_own():
    order = Order(count=100, per_step=4, steps=6, seed=3)
    epochs = [
        [i for step in range(6 * e, 6 * e + 6) for i in order.images(step)]
        for e in range(60)
    ]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])
    assert set().union(*epochs) == set(range(100))


def test_the_last_step_of_a_whole_epoch_is_filled_up():
    order = Order(count=5, per_step=3, steps=2, seed=0)
    first = [*order.images(0), *order.images(1)]
    assert set(first) == set(range(5)) and first[5] == first[0]
