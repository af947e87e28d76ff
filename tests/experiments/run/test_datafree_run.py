"""A repair from the weights alone: what it writes, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from experiments import repair
from experiments.run import inputs
from samples import error_of
from sinder_jax import planted
from sinder_jax.model import Model


def command(workdir, *overrides):
    return [
        "--config=datafree.py",
        f"--workdir={workdir}",
        "--config.model=planted",
        *overrides,
    ]


def test_a_sound_model_ends_with_nothing_exported(tmp_path, monkeypatch):
    made = planted.planted_model(0)
    params = jax.tree.map(np.array, made.params)
    params["blocks"]["mlp"]["w3"]["kernel"][made.block][made.unit] = 0.0

    def load(config, path):
        inputs.write_planted(path, made)
        return Model.of(made.config, params)

    monkeypatch.setattr(inputs, "load_model", load)
    assert repair.main(command(tmp_path)) == 0
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["finished"] and told["files"] == []
    assert not (tmp_path / "repaired").exists()


@pytest.mark.slow  # compiling the search takes 20 s of a core
def test_a_defect_is_repaired_without_photographs(tmp_path):
    assert repair.main(command(tmp_path)) == 0
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["changed_blocks"] == [planted.BLOCK]
    assert not told["has_defect_after"]
    for name in told["files"]:
        assert (tmp_path / name).exists()
    assert "repaired.patch.safetensors" in told["files"]
    said = error_of(repair.main, command(tmp_path, "--config.price=0.1"))
    assert "another config" in said


@pytest.mark.parametrize(
    "override",
    ["--config.price=0", "--config.repair=sinder", "--config.plant=4"],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(tmp_path, override):
    workdir = tmp_path / "run"
    assert override.split("=")[0][2:] in error_of(
        repair.main, command(workdir, override)
    )
    assert not workdir.exists()
