"""`diff` and `apply`: what a repair changed, and the repair made again."""

import numpy as np
import pytest

import convert
import golden
from conversions import CONTAINERS, KINDS, loaded, refusal, repair, run, stored
from convert.commands import lines
from convert.files import reading, writing
from samples import SMALL, random_params, read_state_dict
from sinder_jax import factor, param_tree


def assert_is_repaired(path, repaired, base, changed_block):
    """Kernels within 1e-6, all else byte for byte as in the base."""
    got = loaded(path)
    for name, want in param_tree.flatten(repaired).items():
        if name == "mask_token":
            continue
        original = param_tree.flatten(base)[name]
        if name in ("cls_token", "pos_embed"):
            continue  # timm's are added up; compared by digest below
        if want.tobytes() == original.tobytes():
            assert got[name].tobytes() == original.tobytes(), name
            continue
        for block, kernel in enumerate(want):
            if block != changed_block:
                assert got[name][block].tobytes() == original[block].tobytes()
            # ε comes back within half an ulp of σ; the rest is float32's rounding
            error = np.linalg.norm(got[name][block] - kernel)
            assert error < 1e-6 * np.linalg.norm(kernel), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_apply_of_diff_is_the_repaired_model(container, kind, tmp_path, capsys):
    config, (params, _, _, repaired) = KINDS[kind], repair(kind)
    (tmp_path / "b").mkdir()
    (tmp_path / "r").mkdir()
    base = stored(tmp_path / "b", container, config, params)
    other = stored(tmp_path / "r", "dinov2", config, repaired)
    made = tmp_path / "made.safetensors"
    run("diff", base, other, made)
    out = capsys.readouterr().out
    assert f"in blocks {config.depth - 1};" in out and "left out as rounding" in out
    target = tmp_path / ("done" if base.is_dir() else "done.safetensors")
    run("apply", base, made, target)
    assert_is_repaired(target, repaired, params, config.depth - 1)
    if container != "checkpoint":  # in the base's own layout, nothing more or less
        want = reading.open_state_dict(base)
        assert reading.open_state_dict(target).keys() == want.keys()
        assert reading.open_state_dict(target).config == want.config
    steps = convert.open_model(target).provenance["steps"]
    assert "apply made.safetensors, SHA-256" in steps[-1]
    assert made.stat().st_size < 100_000


def test_the_kernel_of_a_running_svd_is_told_once_and_not_on_stdout(capsys):
    running = lines.RunningSVD()
    for block in range(3):
        for name in ("attn/v", "mlp/w3"):
            running(name, block)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "SVDs of attn/v\nSVDs of mlp/w3\n"


def test_a_patch_fits_its_base_in_any_layout(tmp_path):
    config, (params, _, _, repaired) = KINDS["registers"], repair("registers")
    (tmp_path / "r").mkdir()
    base = stored(tmp_path, "dinov2", config, params)
    other = stored(tmp_path / "r", "hf", config, repaired)
    run("diff", base, other, tmp_path / "made.safetensors")
    for container in ("checkpoint", "hf", "timm"):
        base = stored(tmp_path, container, config, params)
        target = tmp_path / f"done_{container}{'' if base.is_dir() else '.safetensors'}"
        run("apply", base, tmp_path / "made.safetensors", target)
        assert_is_repaired(target, repaired, params, config.depth - 1)


def test_half_a_patch_is_half_the_change(tmp_path):
    config, (params, factors, eps, repaired) = KINDS["swiglu"], repair("swiglu")
    (tmp_path / "r").mkdir()
    base = stored(tmp_path, "dinov2", config, params)
    other = stored(tmp_path / "r", "dinov2", config, repaired)
    run("diff", base, other, tmp_path / "made.safetensors")
    half = tmp_path / "half.safetensors"
    run("apply", base, tmp_path / "made.safetensors", half, "--scale=0.5")
    want = factor.merge(params, factors, {name: e / 2 for name, e in eps.items()})
    assert_is_repaired(half, want, params, config.depth - 1)


def test_another_base_is_refused(tmp_path, capsys):
    config, (params, _, _, repaired) = KINDS["swiglu"], repair("swiglu")
    (tmp_path / "r").mkdir()
    base = stored(tmp_path, "dinov2", config, params)
    other = stored(tmp_path / "r", "dinov2", config, repaired)
    run("diff", base, other, tmp_path / "made.safetensors")
    target = tmp_path / "done.safetensors"
    line = refusal(capsys, "apply", other, tmp_path / "made.safetensors", target)
    assert "a delta fits only the very weights" in line and not target.exists()
    small = stored(
        tmp_path / "r", "checkpoint", SMALL["mlp"], random_params(SMALL["mlp"])
    )
    line = refusal(
        capsys, "apply", small, tmp_path / "made.safetensors", tmp_path / "x"
    )
    assert "architectures differ in" in line and not (tmp_path / "x").exists()
    line = refusal(capsys, "diff", base, small, tmp_path / "x.safetensors")
    assert "architectures differ in embed_dim (64 and 128)" in line


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_the_authors_rebuilt_files_give_a_patch(name, tmp_path, capsys):
    arrays, meta = golden.load(name)
    writing.write_state_dict(tmp_path / "base.safetensors", golden.state(arrays))
    merged = golden.state(arrays) | golden.state(arrays, "merged")
    writing.write_state_dict(tmp_path / "merged.safetensors", merged)
    heads = f"--num-heads={meta['num_heads']}"
    base, made = tmp_path / "base.safetensors", tmp_path / "made.safetensors"
    run("diff", base, tmp_path / "merged.safetensors", made, heads)
    run("apply", base, made, tmp_path / "done.safetensors", heads)
    got = read_state_dict(tmp_path / "done.safetensors")
    for key, tensor in merged.items():
        # the authors' float32 SVDs and sums: 2.5e-6 measured in our own runs
        error = np.linalg.norm(got[key] - tensor)
        assert error <= 5e-6 * np.linalg.norm(tensor), key
    assert "differ by rounding alone" in capsys.readouterr().out


def test_a_change_that_is_no_repair_is_refused_by_name(tmp_path, capsys):
    config, (params, _, _, repaired) = KINDS["swiglu"], repair("swiglu")
    base = stored(tmp_path, "dinov2", config, params)
    state = convert.to_torch(config, repaired)
    state["blocks.0.norm1.weight"] = state["blocks.0.norm1.weight"] * 1.01
    writing.write_state_dict(tmp_path / "other.safetensors", state)
    made = tmp_path / "made.safetensors"
    line = refusal(capsys, "diff", base, tmp_path / "other.safetensors", made)
    assert "norm1/scale of block 0 by 0.01" in line and not made.exists()
