"""Runs small enough to be started in a test, and what they are started with."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import config as config_files
from experiments.run import first_start
from experiments.run.workdir import Workdir
from sinder_jax import param_tree, vit

PLAIN = vit.ViTConfig(64, 2, 1, "swiglu", img_size=28)
REGISTERS = dataclasses.replace(
    PLAIN, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0
)


def weights(architecture: vit.ViTConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = param_tree.flatten(param_tree.shapes(architecture))
    params = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in shapes.items()}
    return param_tree.unflatten(params)


def config(**changes):
    changed = config_files.load("tiny.py")
    changed.update(changes)
    return changed


def started(path: Path, **changes) -> Workdir:
    """A workdir in which a run of tiny.py was started and its factors computed."""
    workdir = Workdir(str(path))
    first_start.settle_config(workdir, config(**changes), images_per_step=3)
    workdir.frozen.mkdir()
    return workdir


def names(folder: Path) -> list[str]:
    """Names in a folder but `claims`, which `test_claim.py` tests."""
    return sorted(path.name for path in folder.iterdir() if path.name != "claims")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for i, name in enumerate(["a.png", "b.png", "c/d.png", "e.png", "f.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (i, i, i)).save(folder / name)
    return folder


@pytest.fixture
def small_hub(monkeypatch):
    """Two hub names that mean models small enough to be written here."""
    monkeypatch.setitem(vit.CONFIGS, "dinov2_vits14", PLAIN)
    monkeypatch.setitem(vit.CONFIGS, "dinov2_vits14_reg", REGISTERS)
