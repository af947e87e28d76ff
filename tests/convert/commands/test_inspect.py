"""`inspect`: what it says of models and deltas."""

import numpy as np
import pytest

from conversions import CONTAINERS, KINDS, refusal, repair, run, stored
from convert.files import sha256
from samples import SMALL, random_params
from sinder_jax import checkpoint, delta, kernels
from sinder_jax.storage import delta_file


@pytest.mark.parametrize("container", CONTAINERS)
def test_inspect_prints_the_largest_singular_values(container, tmp_path, capsys):
    config, params = KINDS["swiglu"], random_params(KINDS["swiglu"])
    run("inspect", stored(tmp_path, container, config, params))
    out = capsys.readouterr().out
    assert "dinov2 layout" in out or "not known" in out or container in out
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("block "))
    assert lines[start].split()[1:] == list(kernels.names(config))
    _, stacks = kernels.split(config, params)
    for block in range(config.depth):
        cells = lines[start + 1 + block].split()
        want = [np.linalg.norm(stack[block], 2) for stack in stacks.values()]
        assert int(cells[0]) == block
        # printed with four decimals
        np.testing.assert_allclose([float(x) for x in cells[1:]], want, atol=6e-5)


def test_inspect_says_what_it_verified(tmp_path, capsys):
    path = stored(tmp_path, "dinov2", SMALL["mlp"], random_params(SMALL["mlp"]))
    run("inspect", path)
    out = capsys.readouterr().out
    assert "the bytes against dinov2.safetensors.sha256" in out
    assert sha256.of_file(path) in out
    sha256.side_file(path).unlink()
    run("inspect", path)
    assert "no .sha256 is beside it" in capsys.readouterr().out


def test_a_changed_export_is_noticed_without_its_side_file(tmp_path, capsys):
    checkpoint.save(tmp_path / "jax", SMALL["mlp"], random_params(SMALL["mlp"]))
    run("to-torch", tmp_path / "jax", tmp_path / "a.safetensors")
    sha256.side_file(tmp_path / "a.safetensors").unlink()
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x3f")
    for command in (["inspect"], ["to-jax"]):
        target = [tmp_path / "dst"] if command == ["to-jax"] else []
        line = refusal(capsys, *command, tmp_path / "a.safetensors", *target)
        assert "damaged" in line and not (tmp_path / "dst").exists()


def test_a_patch_is_inspected(tmp_path, capsys):
    config, (params, factors, eps, _) = KINDS["swiglu"], repair("swiglu")
    made = delta.from_eps(config, params, factors, eps)
    delta_file.save(tmp_path / "a.safetensors", made)
    run("inspect", tmp_path / "a.safetensors")
    out = capsys.readouterr().out
    assert made.base in out and "in blocks 1;" in out
