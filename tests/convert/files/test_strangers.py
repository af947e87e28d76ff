"""convert/files/strangers.py: what is no file of weights is named for what it is."""

import gzip
import io
import json
import os
import socket
import tarfile
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from conversions import refusal, run
from convert.files import sha256
from samples import SMALL, random_state


def tar():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return made.getvalue()


def zipped(*names):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 99)
    return made.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"0" * 64
    + b"\nsize 346378731\n"
)
WEIGHTS = save({"cls_token": np.ones((1, 1, 64), np.float32)})
CONTENTS = {
    "git-lfs": (LFS, "pointer of Git LFS, not the file itself; run `git lfs pull`"),
    "git-annex": (b"/annex/objects/SHA256E-s9--0.pth\n", "git annex get"),
    "page": (b"\n<!DOCTYPE html>\n<html>Sign in</html>", "a web page, not weights"),
    "page with a mark": (b"\xef\xbb\xbf<html lang=de>\xc3\xa4</html>", "a web page"),
    "answer in XML": (b'<?xml version="1.0"?><Error/>', "a web page"),
    "answer in JSON": (b'{"error":"Repository not found"}', "Repository not found"),
    "answer": (b"Invalid username or password.", "text, not weights ('Invalid user"),
    "empty": (b"", "damaged, an empty file; fetch it again"),
    "gzip": (gzip.compress(WEIGHTS), "packed by gzip; unpack it"),
    "tar": (tar(), "a tar archive; unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file, of TensorFlow or Keras"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.7.0" + bytes(99), "a graph of ONNX"),
    "numpy": (b"\x93NUMPY\x01\0v\0" + bytes(99), "an array of NumPy"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_of_another_kind_is_named(kind, suffix, tmp_path, capsys):
    data, said = CONTENTS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    line = refusal(capsys, "to-jax", path, tmp_path / "dst")
    assert line.startswith(f"error: {path}: ") and said in line


def test_weights_under_the_suffix_of_another_format_are_told(tmp_path, capsys):
    (tmp_path / "a.pth").write_bytes(WEIGHTS)
    line = refusal(capsys, "to-jax", tmp_path / "a.pth", tmp_path / "dst")
    assert "a safetensors file by its bytes; rename it to .safetensors" in line
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(3)}, tmp_path / "b.pth")
    (tmp_path / "b.pth").rename(tmp_path / "b.safetensors")
    line = refusal(capsys, "to-jax", tmp_path / "b.safetensors", tmp_path / "dst")
    assert "rename it to .pth" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.onnx", "ONNX"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
        ("__0_0.distcp", "give the folder"),
        ("model", "unknown suffix ''"),
    ],
)
def test_a_suffix_of_another_format_is_named(name, said, tmp_path, capsys):
    (tmp_path / name).write_bytes(bytes(range(256)))
    assert said in refusal(capsys, "to-jax", tmp_path / name, tmp_path / "dst")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "a directory that is empty"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
        (["model_final.rank_0.pth", "model_final.rank_1.pth"], "FSDP training"),
        (["blobs", "snapshots", "refs"], "the folder in snapshots/"),
        (["config.json", "tf_model.h5"], "tf_model.h5 alone, weights for TensorFlow"),
        (["config.json", "flax_model.msgpack"], "weights for Flax"),
        (["config.json", "model.fp16.safetensors"], "of it: model.fp16.safetensors"),
        (["config.json", ".gitattributes"], "without its weights; fetch them again"),
        (["notes.txt"], "a directory without our metadata and without model.saf"),
    ],
    ids=str,
)
def test_a_folder_of_another_kind_is_named(names, said, tmp_path, capsys):
    (tmp_path / "src").mkdir()
    for name in names:
        (tmp_path / "src" / name).write_bytes(b"x" * 99)
    for command, target in (("to-jax", "dst"), ("to-torch", "dst.safetensors")):
        line = refusal(capsys, command, tmp_path / "src", tmp_path / target)
        assert said in line, line


def test_a_pointer_beside_the_weights_is_named(tmp_path, capsys):
    """Of a repository cloned without Git LFS, any file may be a pointer."""
    (folder := tmp_path / "src").mkdir()
    (folder / "model.safetensors").write_bytes(LFS)
    assert "git lfs pull" in refusal(capsys, "to-jax", folder, tmp_path / "dst")
    index = {"weight_map": {"cls_token": "a.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "a.safetensors").write_bytes(LFS)
    line = refusal(capsys, "to-jax", folder, tmp_path / "dst")
    assert "a.safetensors: a pointer of Git LFS" in line
    (folder / "a.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_bytes(LFS)
    line = refusal(capsys, "to-jax", folder, tmp_path / "dst")
    assert "config.json: a pointer of Git LFS" in line


# --- What PyTorch saved that is no model ----------------------------------------------


def pickled(path, contents):
    torch = pytest.importorskip("torch")
    torch.save(contents, path)
    return path


@pytest.mark.parametrize("name", ["model_final.rank_0.pth", "model.pth"])
def test_flat_parameters_of_fsdp_are_named(name, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    key = "teacher.backbone._fsdp_wrapped_module._flat_param"
    path = pickled(tmp_path / name, {"model": {key: torch.ones(9)}})
    line = refusal(capsys, "to-jax", path, tmp_path / "dst")
    assert "FSDP" in line and "teacher_checkpoint.pth" in line


def test_sharded_tensors_are_named_and_nothing_runs(tmp_path, capsys):
    """Such a pickle, made without a group of processes."""
    code = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n("
    code += b"ctorch.distributed._shard.sharded_tensor.api\nShardedTensor\nNtR."
    path = tmp_path / "model_final.rank_0.pth"
    pickled(path, {})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, code if name.endswith("data.pkl") else data)
    line = refusal(capsys, "to-jax", path, tmp_path / "dst")
    assert "FSDP" in line and "teacher_checkpoint.pth" in line and "code" not in line


def test_an_optimizer_and_a_script_are_named(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9).state_dict()
    path = pickled(tmp_path / "optimizer.pth", optimizer)
    assert "state of an optimizer" in refusal(capsys, "to-jax", path, tmp_path / "x")
    (tmp_path / "script.pth").write_bytes(
        zipped("model/data.pkl", "model/constants.pkl", "model/code/x.py")
    )
    line = refusal(capsys, "to-jax", tmp_path / "script.pth", tmp_path / "x")
    assert "a TorchScript archive, which is code; save its weights" in line


def test_wrappers_inside_block_names_are_stripped(tmp_path):
    state = random_state(SMALL["swiglu"])
    for wrapper in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"):
        wrapped = {k.replace("s.1.", f"s.1.{wrapper}."): x for k, x in state.items()}
        assert wrapped != state
        (tmp_path / f"{wrapper}.safetensors").write_bytes(save(wrapped))
        run("to-jax", tmp_path / f"{wrapper}.safetensors", tmp_path / wrapper)


# --- What is no regular file ------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def endless_device(path):
    path.symlink_to("/dev/zero")


SPECIAL = [fifo, unix_socket, endless_device]


@pytest.mark.parametrize("make", SPECIAL)
def test_a_source_without_an_end_is_refused_at_once(make, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    make(path)
    for command, target in (
        ("to-jax", "dst"),
        ("to-torch", "dst.safetensors"),
        ("inspect", None),
    ):
        arguments = [tmp_path / target] if target else []
        line = refusal(capsys, command, path, *arguments)
        assert f"{path}: neither a file nor a folder" in line
    good = tmp_path / "good.safetensors"
    good.write_bytes(save(random_state(SMALL["swiglu"])))
    target = tmp_path / "x.safetensors"
    assert "is not a file" in refusal(capsys, "apply", good, path, target)


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_part_of_a_source_without_an_end_is_refused(name, make, tmp_path, capsys):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(random_state(SMALL["swiglu"])))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    line = refusal(capsys, "to-jax", folder, tmp_path / "dst")
    assert f"{name}: neither a file nor a folder" in line


def test_a_side_file_without_an_end_is_refused(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(random_state(SMALL["swiglu"])))
    with sha256.side_file(path).open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    line = refusal(capsys, "to-jax", path, tmp_path / "dst")
    assert "not a list of SHA-256 digests" in line
