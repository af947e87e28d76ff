"""`to-jax` of weights that are downloaded by name."""

import shutil

from conversions import refusal, stored
from convert import fetch
from samples import SMALL, random_params


def test_a_fetched_name_must_be_the_named_architecture(tmp_path, monkeypatch, capsys):
    path = stored(tmp_path, "dinov2", SMALL["mlp"], random_params(SMALL["mlp"]))
    shutil.copy(path, tmp_path / "dinov2_vits14_pretrain.safetensors")
    monkeypatch.setattr(
        fetch,
        "fetch",
        lambda name: tmp_path / "dinov2_vits14_pretrain.safetensors",
    )
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, "to-jax", "dinov2_vits14", tmp_path / "jax")
    assert "got a DINOv2 model of width 128" in line
    assert not (tmp_path / "jax").exists()
