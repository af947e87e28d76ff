"""A repair from the weights alone: what it writes, and what it refuses."""

import json
import os
import shutil
import signal

import pytest

import convert
import photos
from experiments import repair, status
from experiments.run import datafree_run, results
from samples import error_of
from sinder_jax import checkpoint, cli, datafree, param_tree
from sinder_jax.model import open_checkpoint
from small_runs import PLAIN, config
from throwing import throwing


@pytest.fixture
def run(small_hub, tmp_path):
    """Starts a job on the checkpoint in tmp_path/model; returns its exit code."""

    def start(*overrides, workdir="run"):
        return repair.main(
            [
                "--config=datafree.py",
                f"--workdir={tmp_path / workdir}",
                "--config.model=dinov2_vits14",
                f"--config.checkpoint={tmp_path / 'model'}",
                *overrides,
            ]
        )

    return start


def save(path, blocks=(), seed=0):
    """A checkpoint of a model whose blocks throw tokens; returns its params."""
    params, _ = throwing(PLAIN, blocks, seed=seed)
    shutil.rmtree(path, ignore_errors=True)
    checkpoint.save(path, PLAIN, params)
    return params


def read(workdir):
    return json.loads((workdir / "summary.json").read_text())


# --- A model without a defect ---------------------------------------------------------


def test_a_sound_model_is_told_to_be_used_as_it_is(run, tmp_path, capsys):
    save(tmp_path / "model")
    assert run() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("No singular defect is forecast")
    as_it_is = f"use {tmp_path / 'model'} as it is"
    assert said[-1] == f"finished: nothing to repair, nothing exported; {as_it_is}"
    told = read(tmp_path / "run")
    assert told["finished"] and told["files"] == [] and told["block"] == -1
    assert told["verdict"] == "no singular defect" and told["go_on"] == as_it_is
    assert not list((tmp_path / "run").glob("repaired*"))
    assert "nothing to repair" in error_of(convert.open_model, tmp_path / "run")
    shown = status.lines(status.read(tmp_path / "run", now=0.0))
    assert [line.split()[0] for line in shown if "devices" not in line] == [
        *("run", "model", "verdict", "state", "next")
    ]
    assert shown[-1].endswith(as_it_is)
    assert run() == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("long", [0.0, 2.5])
def test_photographs_with_long_tokens_and_no_forecast_defect_are_told(
    run, tmp_path, capsys, monkeypatch, long
):
    measured = {"defective_patches_by_norm": {"before": long, "after": long}}
    given = []

    def measure(self, photographs, params, most):
        given.append((len(photographs), param_tree.digest(params)))
        return measured

    monkeypatch.setattr(results.Observer, "measure", measure)
    params = save(tmp_path / "model")
    photos.save_noise(tmp_path / "data/0.png", 60, 60)
    data = f"--config.data={tmp_path / 'data'}"
    assert run(data, "--config.image_size=56") == 0
    assert given == [(1, param_tree.digest(params))]
    assert read(tmp_path / "run")["looked_at"] == measured
    told = "2.50 patches a photograph have large norms" in capsys.readouterr().err
    assert told == bool(long)


def test_photographs_that_cannot_be_looked_at_are_named(run, tmp_path, capsys):
    save(tmp_path / "model")
    for i in range(3):
        photos.save_noise(tmp_path / f"data/{i}.png", 60, 60)
    (tmp_path / "data/1.png").write_bytes(b"not a picture")
    assert run(f"--config.data={tmp_path / 'data'}", "--config.image_size=56") == 0
    said = capsys.readouterr().out
    assert f"skipped, unreadable: {tmp_path}/data/1.png: not an image" in said
    assert len(read(tmp_path / "run")["looked_at"]["each"]) == 2


def test_another_start_in_a_finished_workdir_is_held_to_the_first(run, tmp_path):
    save(tmp_path / "model")
    assert run() == 0
    said = error_of(run, "--config.price=0.1")
    assert "price was 1.0 and is 0.1; choose another --workdir" in said
    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert run(f"--config.checkpoint={tmp_path / 'moved'}") == 0
    missing = f"--config.checkpoint={tmp_path / 'missing'}"
    assert "does not exist" in error_of(run, missing, kind=FileNotFoundError)
    assert run() == 0  # its checkpoint is gone, and it is finished
    save(tmp_path / "model", seed=1)
    assert "holds a repair of other weights" in error_of(run)


def test_a_repair_of_another_kind_needs_another_workdir(run, tmp_path):
    save(tmp_path / "model")
    assert run() == 0
    for force in [], ["--force"]:
        said = error_of(
            repair.main,
            ["--config=tiny.py", f"--workdir={tmp_path / 'run'}", *force],
        )
        assert "repair was 'datafree' and is 'sinder'; choose another --w" in said
    (tmp_path / "sinder" / "frozen").mkdir(parents=True)
    (tmp_path / "sinder" / "config.json").write_text(json.dumps(config().to_dict()))
    said = error_of(run, workdir="sinder")
    assert "repair was 'sinder' and is 'datafree'; choose another --workdir" in said


def test_a_run_that_is_told_to_stop_begins_again(run, tmp_path, monkeypatch, capsys):
    save(tmp_path / "model")
    singular_defects = datafree_run.defects.singular_defects

    def stopped(*given):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(datafree_run.defects, "singular_defects", stopped)
    assert run() == cli.TRY_AGAIN
    assert capsys.readouterr().err.startswith("stopped by SIGTERM: run the same")
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(datafree_run.defects, "singular_defects", singular_defects)
    assert run("--config.price=0.1") == 0  # nothing was computed with the other price


# --- A model with a defect ------------------------------------------------------------


@pytest.mark.slow  # compiling the search takes 10 s of a core
def test_a_defect_is_repaired_without_photographs(run, tmp_path, capsys):
    params = save(tmp_path / "model", [0])
    data = ["--config.data=sample", "--config.measure_images=2"]
    data += ["--config.image_size=28"]
    assert run(*data) == 0
    told = read(tmp_path / "run")
    assert told["changed_blocks"] == [0] and told["verdict"] == "singular defect"
    assert not told["has_defect_after"]
    assert len(told["looked_at"]["each"]) == 2
    names = {"repaired", "repaired.safetensors", "repaired.patch.safetensors"}
    assert names | {"before_after.png"} <= set(told["files"])
    repaired = open_checkpoint(tmp_path / "run" / "repaired")
    assert repaired.config == PLAIN  # resamples as before
    want = datafree.repair(PLAIN, params)
    assert repaired.digest == param_tree.digest(want.params)
    again = convert.open_model(tmp_path / "run" / "repaired.safetensors")
    assert again.digest == repaired.digest

    (tmp_path / "run" / "repaired.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "run" / "repaired")
    capsys.readouterr()
    assert run(*data) == 0
    said = capsys.readouterr().err
    assert "missing or damaged: repaired, repaired.safetensors; made again" in said
    assert read(tmp_path / "run")["sha256"] == told["sha256"]


@pytest.mark.slow  # compiling the search takes 20 s of a core
def test_the_demo_s_model_is_repaired(tmp_path):
    arguments = ["--config=datafree.py", "--config.model=planted"]
    assert repair.main([*arguments, f"--workdir={tmp_path}"]) == 0
    assert read(tmp_path)["changed_blocks"] == [5]


# --- What it cannot do ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.price=0", "config.price"),
        ("--config.repair=sinder", "config.repair must be datafree"),
        ("--config.measure_images=0", "config.measure_images"),
        ("--config.mask_thr=0", "mask_thr"),
        ("--config.plant=4", "the config has no key plant"),
        ("--config.data=nowhere", "nowhere"),
        ("--force", "--force: not for a repair without photographs"),
        ("--profile=0:1", "--profile: not for"),
        ("--coordinator=host:1", "--coordinator: not for"),
        ("--num-processes=2", "--num-processes: not for"),
        ("--process-id=0", "--process-id: not for"),
    ],
)
def test_it_is_refused_before_anything_is_written(run, tmp_path, argument, said):
    save(tmp_path / "model")
    assert said in error_of(run, argument, kind=(ValueError, OSError))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.model=planted"], "config.model=planted makes its own weights"),
        (["--config.model=dinov9"], "config.model=dinov9 is unknown"),
        (["--config.checkpoint="], "no weights of dinov2_vits14; fetch https"),
        (
            ["--config.model=planted", "--config.checkpoint=", "--config.seed=-1"],
            "config.seed: got -1",
        ),
    ],
)
def test_what_is_wrong_with_the_weights_given_is_told(run, tmp_path, arguments, said):
    assert error_of(run, *arguments).startswith(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", ["0", "1"])
def test_several_processes_are_refused(run, tmp_path, monkeypatch, process):
    save(tmp_path / "model")
    for name, value in {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": process,
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    said = error_of(run)
    assert said.startswith(
        "SLURM_STEP_NUM_TASKS=2: a repair without photographs is one"
    )
    assert not (tmp_path / "run").exists()
