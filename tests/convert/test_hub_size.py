"""A model of a published size, with random weights, through the whole main job."""

import json
import shutil

import numpy as np
import pytest

import convert
from benchmarks import convert_giant, synthetic
from convert.__main__ import main as convert_main
from convert.files import reading, writing
from experiments import repair
from samples import read_state_dict
from sinder_jax import checkpoint, param_tree, vit


@pytest.mark.slow
def test_small_config_repairs_a_hub_file_of_its_size(tmp_path, capsys):
    """small.py as it stands but for a small image and four of them."""
    config = vit.CONFIGS["dinov2_vits14"]
    params = synthetic.random_params(config)
    source = tmp_path / "dinov2_vits14_pretrain.safetensors"
    writing.write_state_dict(source, convert.to_torch(config, params))
    workdir = tmp_path / "run"
    code = repair.main(
        [
            "--config=small.py",
            f"--workdir={workdir}",
            f"--config.checkpoint={source}",
            "--config.data=sample",
            "--config.image_size=224",
            "--config.diagnose=off",  # which finds no defect in random weights
            "--config.max_iter=4",
            "--config.images_per_step=1",
            "--config.measure_images=1",
        ]
    )
    assert code == 0
    assert json.loads((workdir / "summary.json").read_text())["images"] == 4
    repaired = read_state_dict(workdir / "repaired.safetensors")
    original = read_state_dict(source)
    assert repaired.keys() == original.keys()
    _, loaded = checkpoint.load(workdir / "repaired")
    _, converted = convert.from_torch(repaired)
    for path, array in param_tree.flatten(loaded).items():
        assert np.array_equal(array, param_tree.flatten(converted)[path]), path
    # Random weights have hardly a defect; what no step touched has its very bits.
    changed = json.loads((workdir / "summary.json").read_text())["changed_blocks"]
    for key, array in original.items():
        block = int(key.split(".")[1]) if key.startswith("blocks.") else None
        if block not in changed:
            assert np.array_equal(array, repaired[key]), key


SIZES = {"s": (384, 12, False), "b": (768, 12, False), "l": (1024, 24, False)}
SIZES["g"] = (1536, 40, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", vit.CONFIGS)
def test_hub_file_comes_back_byte_for_byte_and_loads_strictly(name, tmp_path):
    """At full shape: .safetensors -> checkpoint -> .pth; 4.5 GB each for the giant."""
    torch = pytest.importorskip("torch")
    from hub_module import Hub

    source, back = tmp_path / "hub.safetensors", tmp_path / "back.pth"
    convert_giant.make_source(source, name)
    for command in (["to-jax", source, "jax"], ["to-torch", "jax", back]):
        words = [tmp_path / word if word == "jax" else word for word in command]
        assert convert_main([str(word) for word in words]) == 0
    size = name.removeprefix("dinov2_vit")[0]
    with torch.device("meta"):
        model = Hub(*SIZES[size], 4 if name.endswith("_reg") else 0)
    loaded = torch.load(back, weights_only=True, mmap=True)
    result = model.load_state_dict(loaded, strict=True, assign=True)
    assert not (result.missing_keys or result.unexpected_keys)
    want = reading.open_state_dict(source)
    assert list(loaded) == list(model.state_dict())
    for key, parameter in model.state_dict().items():
        assert param_tree.digest_of_array(
            parameter.numpy()
        ) == param_tree.digest_of_array(want[key]), key
    for file in (source, back):
        file.unlink()
    shutil.rmtree(tmp_path / "jax")
