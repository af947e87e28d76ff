"""What `convert.open_model` makes of a path; the layouts are in `test_to_torch.py`."""

import pytest

import convert
from samples import SMALL, error_of, random_params
from sinder_jax import checkpoint, param_tree
from sinder_jax.storage import run_files

CONFIG = SMALL["mlp"]


@pytest.fixture
def stored(tmp_path):
    checkpoint.save(tmp_path / "model", CONFIG, random_params(CONFIG))
    return tmp_path / "model"


def test_overrides_change_how_a_checkpoint_resamples(stored):
    opened = convert.open_model(str(stored), interpolate_antialias=True)
    assert opened.config.interpolate_antialias and not CONFIG.interpolate_antialias
    assert opened.digest == convert.open_model(stored).digest


def test_the_name_of_a_published_model_is_no_path_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(convert.open_model, "dinov2_vits14", kind=FileNotFoundError)
    assert "no such file or directory; `python -m convert to-jax dinov2_vits14" in (
        message
    )


def test_overrides_that_contradict_a_checkpoint_are_refused(stored):
    message = error_of(convert.open_model, stored, depth=9)
    assert f"depth ({CONFIG.depth} and 9)" in message
    assert "num_heads (2 and 4)" in error_of(convert.open_model, stored, num_heads=4)


def test_a_workdir_is_opened_as_its_repaired_model(tmp_path):
    (tmp_path / run_files.FROZEN).mkdir()
    assert "not finished" in error_of(convert.open_model, tmp_path)
    repaired = random_params(CONFIG, seed=1)
    checkpoint.save(tmp_path / run_files.REPAIRED, CONFIG, repaired)
    opened = convert.open_model(tmp_path)
    assert opened.digest == param_tree.digest(repaired)
    assert opened.path == tmp_path / run_files.REPAIRED
    (tmp_path / run_files.FROZEN).rmdir()  # to save space
    (tmp_path / "planted.safetensors").touch()
    assert convert.open_model(tmp_path).digest == opened.digest


def test_a_directory_of_nothing_is_refused_by_name(tmp_path):
    assert str(tmp_path) in error_of(convert.open_model, tmp_path)
