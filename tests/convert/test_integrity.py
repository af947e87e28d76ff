"""No damaged byte of a checkpoint or an export is taken for a weight.

Bits are flipped, files cut and deleted, and the program asked as by a user. Either
it refuses, naming the file, or what it gives is to the last bit what was stored.
"""

import collections
import shutil

import numpy as np
import pytest

import convert
from convert.__main__ import main
from convert.files import sha256, writing
from samples import SMALL, random_params
from sinder_jax import checkpoint, delta, param_tree
from sinder_jax.storage import delta_file, errors

CONFIG = SMALL["registers"]
FLIPS = [50, pytest.param(400, marks=pytest.mark.slow)]
KINDS = ["checkpoint", "safetensors", "pth", "hf"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A checkpoint and its exports, by kind."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint.save(folder / "model", CONFIG, random_params(CONFIG), {"source": "test"})
    paths = {"checkpoint": folder / "model"}
    for kind in KINDS[1:]:
        name = "hf" if kind == "hf" else f"model.{kind}"
        if kind == "pth":
            pytest.importorskip("torch")
        layout = "hf" if kind == "hf" else "dinov2"
        command = ["to-torch", str(folder / "model"), str(folder / name)]
        assert main([*command, f"--layout={layout}"]) == 0
        paths[kind] = folder / name
    return paths


def files_of(path):
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path, sha256.side_file(path)]


def copied(path, folder):
    """A copy of a checkpoint or export, with its side file, to damage."""
    if path.is_dir():
        return shutil.copytree(path, folder / path.name)
    shutil.copy(sha256.side_file(path), folder)
    return shutil.copy(path, folder / path.name)


def outcome(path, params):
    """ "detected", "harmless", or "WRONG": other weights without a word."""
    try:
        model = convert.open_model(path)
        got = dict(model.leaves())
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        assert str(path.parent) in str(error), "the file is not named"
        return "detected"
    want = param_tree.flatten(params)
    same = got.keys() == want.keys() and all(
        got[name].tobytes() == array.tobytes() for name, array in want.items()
    )
    return "harmless" if same and model.config == CONFIG else "WRONG"


@pytest.mark.parametrize("flips", FLIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_detected_or_harmless(
    kind, flips, exports, tmp_path, capsys
):
    """Bits chosen at random over all files, a file with the share of its bytes."""
    path = copied(exports[kind], tmp_path)
    params = random_params(CONFIG)
    files = files_of(path)
    sizes = np.array([file.stat().st_size for file in files])
    rng = np.random.default_rng(0)
    score = collections.Counter()
    # Half of the flips by size, half on a file chosen evenly: small ones matter, too.
    for flip in range(flips):
        share = sizes / sizes.sum() if flip % 2 else (sizes > 0) / (sizes > 0).sum()
        file = files[rng.choice(len(files), p=share)]
        bit = int(rng.integers(8 * file.stat().st_size))
        data = bytearray(file.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        whole = file.read_bytes()
        file.write_bytes(data)
        result = outcome(path, params)
        score[result] += 1
        assert result != "WRONG", f"bit {bit} of {file}"
        file.write_bytes(whole)
    with capsys.disabled():
        print(f"\n{kind}: of {flips} flipped bits {dict(score)}")
    assert outcome(path, params) == "harmless"  # the copy is whole again
    assert score["detected"] > flips / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["deleted", "empty", "half", "short"])
def test_every_truncation_and_deletion_is_detected_or_harmless(
    damage, kind, exports, tmp_path
):
    path = copied(exports[kind], tmp_path)
    params = random_params(CONFIG)
    detected = []
    for file in files_of(path):
        data = file.read_bytes()
        kept = {"empty": 0, "half": len(data) // 2, "short": len(data) - 1}
        file.unlink() if damage == "deleted" else file.write_bytes(data[: kept[damage]])
        result = outcome(path, params)
        assert result != "WRONG", file
        if result == "detected":
            detected.append(file.name)
        file.write_bytes(data)
    weights = {"checkpoint": "0.0", "hf": "model.safetensors"}.get(kind, path.name)
    assert any(name.startswith(weights) for name in detected)


def test_a_flipped_weight_is_named(exports, tmp_path):
    path = copied(exports["checkpoint"], tmp_path)
    (chunk,) = (path / "arrays_0" / "blocks.attn.proj.kernel").glob("[0-9]*")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(errors.DamagedError, match="blocks/attn/proj/kernel"):
        checkpoint.load(path)


def test_damaged_states_are_passed_over(tmp_path):
    for number in (5, 10, 20):
        tree = {"eps": np.full(300, number, np.float32)}
        checkpoint.save_tree(tmp_path / f"{number:08}", tree, {"num_images": number})
    (chunk,) = (tmp_path / "00000020/arrays_0/eps").glob("[0-9]*")
    chunk.write_bytes(chunk.read_bytes()[:-2])
    shutil.rmtree(tmp_path / "00000010" / "metadata")
    newest = checkpoint.load_newest(tmp_path)
    assert newest.path.name == "00000005" and newest.metadata == {"num_images": 5}
    assert [path.name for path in newest.damaged] == ["00000020", "00000010"]
    assert "eps" in str(newest.damaged[tmp_path / "00000020"])
    shutil.rmtree(tmp_path / "00000005")
    with pytest.raises(errors.DamagedError, match="none of its checkpoints is whole"):
        checkpoint.load_newest(tmp_path)
    assert checkpoint.load_newest(tmp_path / "none") is None


def test_a_shape_that_asks_for_all_memory_is_not_allocated(exports, tmp_path):
    path = copied(exports["checkpoint"], tmp_path)
    zarray = path / "arrays_0" / "norm.bias" / ".zarray"
    text = zarray.read_text()
    assert '"shape":[64]' in text.replace(" ", "")
    zarray.write_text(text.replace("64", str(2**50)))
    with pytest.raises(errors.DamagedError, match="norm/bias is stored as"):
        checkpoint.load(path)


def test_a_delta_survives_no_flip(exports, tmp_path):
    """As for the rest; `test_delta_file.py` flips bits of the file alone."""
    params = random_params(CONFIG)
    state = convert.to_torch(CONFIG, params)
    state["blocks.1.attn.proj.weight"] = state["blocks.1.attn.proj.weight"] * 1.25
    writing.write_state_dict(tmp_path / "repaired.safetensors", state)
    base, made = exports["safetensors"], tmp_path / "made.safetensors"
    assert (
        main(["diff", str(base), str(tmp_path / "repaired.safetensors"), str(made)])
        == 0
    )
    loaded, _ = delta_file.load(made)
    assert delta.touched(loaded) == (1,)
    data = bytearray(made.read_bytes())
    data[-5] ^= 4
    made.write_bytes(data)
    target = str(tmp_path / "done.safetensors")
    assert main(["apply", str(base), str(made), target]) == 2
