import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.__main__ import main
from convert.files import writing
from loading import loaded
from samples import assert_same_bytes, read_state_dict
from sinder_jax import checkpoint, param_tree, vit

SOURCE_FILES = {".safetensors": [".safetensors", ".safetensors.sha256"]}
SOURCE_FILES[".pth"] = SOURCE_FILES[".safetensors"] + [".pth", ".pth.sha256"]
CONFIG = vit.ViTConfig(64, 2, 1, "swiglu", img_size=28)
HEADS = f"--num-heads={CONFIG.num_heads}"
NUM_PARAMS = f"{param_tree.num_params(CONFIG):,} parameters"


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(0)
    shapes = param_tree.flatten(param_tree.shapes(CONFIG))
    params = {p: rng.standard_normal(x.shape, np.float32) for p, x in shapes.items()}
    return convert.to_torch(CONFIG, param_tree.unflatten(params))


@pytest.fixture
def source(tmp_path, state):
    writing.write_state_dict(tmp_path / "hub.safetensors", state)
    return tmp_path / "hub.safetensors"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def failure(capsys, *arguments):
    """The one line that a failing command prints; its exit code must be 2."""
    capsys.readouterr()
    try:
        code = run(*arguments)
    except SystemExit as ended:  # argparse
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def fields(out):
    """The lines `name: value` of an output."""
    return dict(line.split(":", 1) for line in out.splitlines() if ":" in line)


# --- What it does -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_there_and_back_gives_the_same_bytes(suffix, source, state, tmp_path, capsys):
    if suffix == ".pth":
        pytest.importorskip("torch")
        writing.write_state_dict(tmp_path / "hub.pth", state)
        source = tmp_path / "hub.pth"
    assert run("to-jax", source, tmp_path / "jax", HEADS) == 0
    assert run("to-torch", tmp_path / "jax", tmp_path / f"back{suffix}") == 0
    out, err = capsys.readouterr()
    assert err == ""
    digests = set()
    for line in out.splitlines():
        assert f"{len(state)} tensors" in line and NUM_PARAMS in line
        digests.add(re.search("digest ([0-9a-f]{64})", line)[1])
    assert len(out.splitlines()) == 2 and len(digests) == 1
    back = read_state_dict(tmp_path / f"back{suffix}")
    assert_same_bytes({key: back[key] for key in state}, state)
    assert back.keys() == state.keys()
    names = {path.name for path in tmp_path.iterdir()}
    made = {"jax", f"back{suffix}", f"back{suffix}.sha256"}
    assert names == made | {f"hub{end}" for end in SOURCE_FILES[suffix]}


def test_options_reach_the_config(source, tmp_path):
    options = ["--num-heads=2", "--interpolate-antialias=true"]
    assert run("to-jax", source, tmp_path / "a", *options) == 0
    config, _ = checkpoint.load(tmp_path / "a")
    assert (config.num_heads, config.interpolate_antialias) == (2, True)
    assert config.interpolate_offset == 0.1
    options = ["--interpolate-offset=0", "--interpolate-antialias=False"]
    assert run("to-jax", source, tmp_path / "b", *options) == 0
    config, _ = checkpoint.load(tmp_path / "b")
    assert (config.interpolate_antialias, config.interpolate_offset) == (False, 0.0)


def test_conversion_to_float32_is_said(state, tmp_path, capsys):
    half = {key: array.astype(ml_dtypes.bfloat16) for key, array in state.items()}
    writing.write_state_dict(tmp_path / "half.safetensors", half)
    assert run("to-jax", tmp_path / "half.safetensors", tmp_path / "jax") == 0
    assert "bfloat16 became float32" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_inspect_says_what_is_there(kind, source, tmp_path, capsys):
    if kind == "checkpoint":
        run("to-jax", source, tmp_path / "jax")
        capsys.readouterr()
    path, layout = {
        "file": (source, "dinov2"),
        "checkpoint": (tmp_path / "jax", "sinder_jax"),
    }[kind]
    assert run("inspect", path) == 0
    lines = fields(capsys.readouterr().out)
    assert lines["width"].strip() == "64, 1 heads of 64"
    assert lines["blocks"].strip() == "2, FFN swiglu, hidden 176"
    assert lines["number format"].strip() == "float32"
    assert layout in lines["layout"] and NUM_PARAMS in lines["size"]


def test_inspect_names_the_hub_model(tmp_path, capsys):
    config = vit.CONFIGS["dinov2_vits14"]
    shapes = param_tree.flatten(param_tree.shapes(config))
    zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    checkpoint.save(tmp_path / "small", config, param_tree.unflatten(zeros))
    assert run("inspect", tmp_path / "small") == 0
    out = capsys.readouterr().out
    assert "dinov2_vits14\n" in out and "22,056,576 parameters" in out


# --- How it fails -----------------------------------------------------------------


def test_existing_destination_is_kept(source, tmp_path, capsys):
    (tmp_path / "jax").mkdir()
    assert "exists" in failure(capsys, "to-jax", source, tmp_path / "jax")
    assert not list((tmp_path / "jax").iterdir())
    run("to-jax", source, tmp_path / "model")
    before = source.read_bytes()
    assert "exists" in failure(capsys, "to-torch", tmp_path / "model", source)
    assert source.read_bytes() == before


@pytest.mark.parametrize("command", ["to-jax", "to-torch"])
def test_destination_is_checked_before_the_source_is_read(command, tmp_path, capsys):
    (tmp_path / "dst.safetensors").mkdir()
    line = failure(capsys, command, tmp_path / "none.pth", tmp_path / "dst.safetensors")
    assert "dst.safetensors exists" in line


def test_a_name_of_two_lines_gives_an_error_of_one(tmp_path, capsys):
    failure(capsys, "inspect", tmp_path / "two\nlines.safetensors")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["to-jax", "none.safetensors", "dst"], "none.safetensors"),
        (["to-jax", "hub.safetensors", "none/dst"], "none"),
        (["to-jax", "folder", "dst"], "directory"),
        (["to-jax", "broken.safetensors", "dst"], "damaged"),
        (["to-jax", "hf.safetensors", "dst"], "encoder.layer.0"),
        (["to-jax", "nan.safetensors", "dst", HEADS], "NaN"),
        (["to-jax", "hub.safetensors", "dst", "--num-heads=5"], "num_heads=5"),
        (["to-jax", "hub.safetensors", "dst", "--interpolate-offset=nan"], "offset"),
        (["to-jax", "hub.safetensors", "dst", "--interpolate-antialias=1"], "true"),
        (["to-jax", "hub.safetensors", "dst", "--heads=5"], "--heads"),
        (["to-jax", "hub.safetensors"], "DST"),
        (["to-torch", "none", "dst.safetensors"], "none"),
        (["to-torch", "folder", "dst.safetensors"], "not a checkpoint"),
        (["to-torch", "hub.safetensors", "dst.pth", "--layout=hf"], "directory"),
        (["to-jax", "dinov2_vitx14", "dst"], "dinov2_vits14"),
        (["diff", "hub.safetensors", "patch.safetensors"], "not a workdir"),
        (["diff", "hub.safetensors", "nan.safetensors", "patch.safetensors"], "NaN"),
        (["diff", "hub.safetensors", "hub.safetensors", "p.safetensors"], "not differ"),
        (["diff", "hub.safetensors", "hub.safetensors", "patch.pth"], "patch.pth"),
        (["diff", "a", "b", "c", "patch.safetensors"], "BASE REPAIRED DELTA"),
        (["diff", "hub.safetensors"], "DELTA"),
        (["apply", "hub.safetensors", "none.safetensors", "dst.safetensors"], "none"),
        (["apply", "hub.safetensors", "hub.safetensors", "a.safetensors"], "patch"),
        (["apply", "hub.safetensors", "x", "dst.safetensors", "--scale=2"], "scale"),
        (["apply", "hub.safetensors", "x", "dst"], "suffix"),
        (["to-torch", "folder", "dst.onnx"], ".onnx"),
        (["to-torch", "folder", "dst.safetensors", "--layout=x"], "'dinov2'"),
        (["inspect", "none"], "none"),
        (["inspect", "folder"], "not a checkpoint"),
        (["convert-all"], "convert-all"),
        ([], "COMMAND"),
    ],
    ids=" ".join,
)
def test_failure_is_one_line_and_writes_nothing(
    arguments, named, source, state, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(source.read_bytes()[:-10])
    hf = {key.replace("blocks.", "encoder.layer."): x for key, x in state.items()}
    writing.write_state_dict("hf.safetensors", hf)
    nan = state | {"norm.bias": np.full(64, np.nan, np.float32)}
    writing.write_state_dict("nan.safetensors", nan)
    before = sorted(tmp_path.rglob("*"))
    assert named in failure(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_misfits_stand_in_one_line_with_the_file(state, tmp_path, capsys):
    broken = {key: array for key, array in state.items() if "norm1" not in key}
    writing.write_state_dict(tmp_path / "a.safetensors", broken)
    line = failure(capsys, "to-jax", tmp_path / "a.safetensors", tmp_path / "dst")
    assert "a.safetensors" in line and "4 missing: blocks.0.norm1.weight" in line


def test_evil_pickle_ends_in_one_line_and_runs_nothing(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    target = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return target.mkdir, ()

    torch.save({"cls_token": Evil()}, tmp_path / "evil.pth")
    line = failure(capsys, "to-jax", tmp_path / "evil.pth", tmp_path / "dst")
    assert "evil.pth" in line
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_help_shows_a_real_call_without_loading_jax():
    output, names = loaded("convert.__main__", main=["--help"])
    assert "python -m convert to-jax dinov2_vitl14_pretrain.pth" in output
    assert not {"jax", "torch"} & names


def test_program_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "convert", "to-jax", "none.pt", tmp_path / "dst"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: none.pt: no such file or directory\n"


@pytest.mark.parametrize("way", ["inside", "arrays", "itself", "around", "link", "up"])
@pytest.mark.parametrize("command", ["to-torch", "diff", "apply"])
def test_a_destination_in_the_source_is_refused(command, way, source, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    run("to-jax", source, tmp_path / "folder" / "model")
    model = tmp_path / "folder" / "model"
    (tmp_path / "link").symlink_to(model)
    target = {
        "inside": model / "x.safetensors",
        "arrays": model / "arrays_0" / "x.safetensors",
        "itself": model,
        "around": tmp_path / "folder",
        "link": tmp_path / "link" / "x.safetensors",
        "up": model / "arrays_0" / ".." / "x.safetensors",
    }[way]
    arguments = {"to-torch": [model, target], "diff": [source, model, target]}
    arguments["apply"] = [model, source, target]
    before = sorted(tmp_path.rglob("*"))
    line = failure(capsys, command, *arguments[command])
    assert "choose" in line or ".safetensors file for a delta" in line
    assert sorted(tmp_path.rglob("*")) == before
    checkpoint.load(model)


def test_a_destination_in_a_folder_to_convert_is_refused(source, tmp_path, capsys):
    run("to-torch", source, tmp_path / "hf", "--layout=hf")
    line = failure(capsys, "to-jax", tmp_path / "hf", tmp_path / "hf" / "jax")
    assert f"is in, around, or the same as {tmp_path / 'hf'}" in line
