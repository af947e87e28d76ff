"""A model of a published size, with random weights, through the whole main job."""

import json

import numpy as np
import pytest

import convert
from benchmarks import giant_step
from convert import io
from experiments import repair
from sinder_jax import checkpoint, vit


@pytest.mark.slow
def test_small_config_repairs_a_hub_file_of_its_size(tmp_path, capsys):
    """small.py as it stands but for a small image and four of them."""
    config = vit.CONFIGS["dinov2_vits14"]
    params = giant_step.random_params(config)
    source = tmp_path / "dinov2_vits14_pretrain.safetensors"
    io.write_state_dict(source, convert.to_torch(config, params))
    workdir = tmp_path / "run"
    code = repair.main(
        [
            "--config=small.py",
            f"--workdir={workdir}",
            f"--config.checkpoint={source}",
            "--config.data=sample",
            "--config.image_size=224",
            "--config.max_iter=4",
            "--config.images_per_step=1",
            "--config.measure_images=1",
        ]
    )
    assert code == 0
    assert json.loads((workdir / "summary.json").read_text())["images"] == 4
    repaired = io.read_state_dict(workdir / "repaired.safetensors")
    original = io.read_state_dict(source)
    assert repaired.keys() == original.keys()
    _, loaded = checkpoint.load(workdir / "repaired")
    _, converted = convert.from_torch(repaired)
    for path, array in checkpoint.flatten(loaded).items():
        assert np.array_equal(array, checkpoint.flatten(converted)[path]), path
    # Random weights have hardly a defect; what no step touched has its very bits.
    changed = json.loads((workdir / "summary.json").read_text())["changed_blocks"]
    for key, array in original.items():
        block = int(key.split(".")[1]) if key.startswith("blocks.") else None
        if block not in changed:
            assert np.array_equal(array, repaired[key]), key


@pytest.mark.slow
def test_benchmark_of_a_whole_step_reaches_the_last_block(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["giant_step", "--model=dinov2_vits14"])
    giant_step.main()
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["layer"] == 11 and numbers["outliers"] >= 3
    assert np.isfinite(numbers["loss"])
