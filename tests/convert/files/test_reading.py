import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import places
from convert.files import reading, writing
from samples import (
    SMALL,
    assert_same_bytes,
    error_of,
    random_state,
    read_state_dict,
)

SUFFIXES = [".pth", ".pt", ".safetensors"]


def file_with(suffix, folder):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    return folder / f"model{suffix}"


def test_missing_file_directory_and_unknown_suffix_are_named(tmp_path):
    missing = tmp_path / "none.safetensors"
    assert str(missing) in error_of(read_state_dict, missing, kind=FileNotFoundError)
    assert "directory" in error_of(read_state_dict, tmp_path)
    other = tmp_path / "model.onnx"
    other.write_bytes(b"x")
    assert "'.onnx'" in error_of(read_state_dict, other)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.1, 0.5, 0.9, -1], ids=str)
def test_truncated_file_is_refused(suffix, kept, tmp_path):
    path = file_with(suffix, tmp_path)
    writing.write_state_dict(path, random_state(SMALL["swiglu"]))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    message = error_of(read_state_dict, path)
    assert str(path) in message and "damaged" in message


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "data", [b"hello, world\n" * 99, b"\xff" * 999, b"PK\3\4" * 99]
)
def test_file_of_something_else_is_refused(suffix, data, tmp_path):
    path = file_with(suffix, tmp_path)
    path.write_bytes(data)
    assert str(path) in error_of(read_state_dict, path)


class Evil:
    """Unpickling it makes a directory."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.mkdir, (Path(self.target),)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_pickle_that_would_run_code_is_refused_and_runs_nothing(new_format, tmp_path):
    torch = pytest.importorskip("torch")
    path, target = tmp_path / "evil.pth", tmp_path / "executed"
    contents = {"cls_token": torch.ones(3), "x": Evil(target)}
    torch.save(contents, path, _use_new_zipfile_serialization=new_format)
    with warnings.catch_warnings(record=True) as caught:
        message = error_of(read_state_dict, path)
    assert not caught
    assert "would run code" in message and str(path) in message
    assert not target.exists()
    # Control: it is evil, and a loader that trusts it does run it.
    torch.load(path, weights_only=False)
    assert target.exists()


def test_plain_pickle_that_would_run_code_is_refused(tmp_path):
    pytest.importorskip("torch")
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"x": Evil(target)}))
    message = error_of(read_state_dict, path)
    assert "would run code" in message
    assert not target.exists()


def test_whole_pickled_model_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    message = error_of(read_state_dict, tmp_path / "model.pth")
    assert "torch.nn.modules.linear.Linear" in message and "state_dict()" in message


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        ([1, 2], "list"),
        ({}, "no tensor"),
        ({"epoch": 3}, "a int in entry 'epoch'"),
        ({1: "tensor"}, "1"),
        ({"heads": {"x": "tensor"}, "epoch": 1}, "a dict in entry 'heads'"),
    ],
    ids=["list", "empty", "number", "numbered", "nested"],
)
def test_pickle_of_something_else_is_refused(contents, named, tmp_path):
    torch = pytest.importorskip("torch")

    def with_tensors(value):
        if isinstance(value, dict):
            return {key: with_tensors(inner) for key, inner in value.items()}
        return torch.ones(2) if value == "tensor" else value

    torch.save(with_tensors(contents), tmp_path / "model.pth")
    message = error_of(read_state_dict, tmp_path / "model.pth")
    assert named in message and "state dict" in message


def test_sparse_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(3).to_sparse()}, tmp_path / "model.pth")
    message = error_of(read_state_dict, tmp_path / "model.pth")
    assert "Sparse" in message and "dense" in message


def test_safetensors_of_an_unknown_number_format_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones(4, np.float32)}, path)
    data = path.read_bytes()
    assert data.count(b'"F32"') == 1
    path.write_bytes(data.replace(b'"F32"', b'"X32"'))
    assert str(path) in error_of(read_state_dict, path)


# --- Training checkpoints, shards and directories -----------------------------------


@pytest.mark.parametrize("outer", [{"teacher"}, {"model"}, {"model", "optimizer"}])
def test_weights_inside_a_training_checkpoint_are_found(outer, tmp_path):
    torch = pytest.importorskip("torch")
    weights = {"backbone.norm.weight": torch.ones(3)}
    contents = dict.fromkeys(outer, weights) | {"iteration": 3}
    torch.save(contents, tmp_path / "model.pth")
    state = reading.open_state_dict(tmp_path / "model.pth")
    assert list(state) == ["backbone.norm.weight"]
    assert set(state.left_out) == outer - {"teacher", "model"} | {"iteration"}


def sharded(folder, state, **changes):
    """A directory as transformers stores it; `changes` to the map of its index."""
    folder.mkdir()
    keys = list(state)
    weight_map = {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read_as_one(tmp_path):
    state = random_state(SMALL["swiglu"])
    folder = sharded(tmp_path / "hf", state)
    (folder / "config.json").write_text('{"num_attention_heads": 2}')
    for path in (folder, folder / "model.safetensors.index.json"):
        got = reading.open_state_dict(path)
        assert_same_bytes({key: got[key] for key in state}, state)
        assert got.keys() == state.keys()
    assert reading.open_state_dict(folder).config == {"num_attention_heads": 2}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("norm.bias", "../other.safetensors", "'../other.safetensors'"),
        ("norm.bias", "/etc/passwd", "'/etc/passwd'"),
        ("norm.bias", "model-00003-of-00002.safetensors", "model-00003"),
        ("norm.bias", ["x"], "expected a .safetensors file"),
        ("head.bias", "model-00001-of-00002.safetensors", "head.bias"),
    ],
    ids=["upwards", "absolute", "missing file", "list", "missing tensor"],
)
def test_index_that_does_not_fit_its_shards_is_refused(key, value, named, tmp_path):
    state = random_state(SMALL["swiglu"])
    save_file(state, tmp_path / "other.safetensors")
    folder = sharded(tmp_path / "hf", state, **{key: value})
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        reading.open_state_dict(folder)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_tensor_in_no_place_of_the_index_is_refused(tmp_path):
    folder = sharded(tmp_path / "hf", random_state(SMALL["swiglu"]))
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    del told["weight_map"]["norm.bias"]
    index.write_text(json.dumps(told))
    assert "norm.bias" in error_of(reading.open_state_dict, folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"weight_map": 3}', '{"a": 1, "a": 2}', "[" * 10**5, "\xff"],
    ids=["empty", "list", "cut", "number", "twice", "deep", "bytes"],
)
def test_broken_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    error_of(reading.open_state_dict, tmp_path)


# --- Evil files -------------------------------------------------------------------


def safetensors_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def float32(shape, start, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def claims_2_60_bytes(path):
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}" + b" " * 2**20)


def tensor_of_2_60_bytes(path):
    safetensors_file(path, {"norm.bias": float32([2**58], 0, 2**60)}, bytes(64))


def overlapping_tensors(path):
    header = {"a": float32([4], 0, 16), "b": float32([4], 8, 24)}
    safetensors_file(path, header, bytes(24))


def backward_offsets(path):
    safetensors_file(path, {"a": float32([4], 16, 0)}, bytes(16))


def path_like_names(path):
    header = {"../../evil": float32([4], 0, 16), "/etc/evil": float32([4], 16, 32)}
    safetensors_file(path, header, bytes(32))


def duplicate_keys(path):
    entry = json.dumps(float32([4], 0, 16))
    safetensors_file(path, f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(16))


def wrong_dtype(path):
    entry = {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}
    safetensors_file(path, {"norm.bias": entry, "cls_token": entry}, bytes(16))


def integers_for_weights(path):
    state = random_state(SMALL["swiglu"])
    save_file({key: tensor.astype(np.int64) for key, tensor in state.items()}, path)


def eight_bit_floats(path):
    entry = {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}
    safetensors_file(path, {"norm.bias": entry}, bytes(64))


def deep_header(path):
    safetensors_file(path, b"[" * 2**20)


def huge_header(path):
    entries = (f'"k{i}": {json.dumps(float32([0], 0, 0))}' for i in range(10**6))
    safetensors_file(path, f"{{{','.join(entries)}}}".encode())


def negative_shape(path):
    safetensors_file(path, {"norm.bias": float32([-4], 0, 16)}, bytes(16))


def rewritten(path, change):
    """A .pth of a small model whose archive `change` has written anew."""
    torch = pytest.importorskip("torch")
    torch.save({"norm.bias": torch.ones(64)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        change(archive, entries)


def zip_bomb(path):
    def change(archive, entries):
        for name, data in entries.items():
            kept = bytes(2**30) if "/data/" in name else data
            archive.writestr(name, kept, zipfile.ZIP_DEFLATED)

    rewritten(path, change)


def many_entries(path):
    def change(archive, entries):
        for name, data in entries.items():
            archive.writestr(name, data)
        for i in range(60_000):
            archive.writestr(f"archive/{i}", b"")

    rewritten(path, change)


def two_pickles(path):
    def change(archive, entries):
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.writestr("other/data.pkl", b".")

    rewritten(path, change)


def pickle_of_many_objects(path):
    def change(archive, entries):
        for name, data in entries.items():
            evil = b"\x80\x02(" + b"}" * (8 * 2**20) + b"l."
            archive.writestr(name, evil if name.endswith("data.pkl") else data)

    rewritten(path, change)


def pickle_that_allocates(path):
    """bytearray(2^33), which torch counts as harmless."""

    def change(archive, entries):
        evil = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (2**33).to_bytes(5, "little")
        for name, data in entries.items():
            code = evil + b"\x85R."
            archive.writestr(name, code if name.endswith("data.pkl") else data)

    rewritten(path, change)


def repeated_number(path):
    """One number seen as 2^40 of them, by strides of zero."""
    torch = pytest.importorskip("torch")
    torch.save({"norm.bias": torch.ones(1).expand(2**40)}, path)


def code_in_a_pickle(path):
    torch = pytest.importorskip("torch")
    torch.save({"cls_token": Evil(path.parent / "executed")}, path)


def bare_pickle(path):
    path.write_bytes(pickle.dumps({"x": Evil(path.parent / "executed")}, protocol=2))


def test_a_record_shorter_than_its_tensor_is_refused(tmp_path):
    """torch would read on into the next record."""

    def change(archive, entries):
        for name, data in entries.items():
            archive.writestr(name, data[:128] if name.endswith("/data/0") else data)

    rewritten(tmp_path / "model.pth", change)
    message = error_of(read_state_dict, tmp_path / "model.pth")
    assert "differ in length" in message


@pytest.mark.parametrize("checked", [True, False], ids=["checksum", "no-checksum"])
def test_a_flipped_bit_of_a_record_is_refused_where_a_checksum_tells(checked, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.serialization.set_crc32_options(checked)
    try:
        torch.save({"x": torch.full((1000,), 3.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state_dict(path)["x"][500] == 3
    data = bytearray(path.read_bytes())
    data[data.index(np.full(1000, 3, np.float32).tobytes()) + 2003] ^= 1
    path.write_bytes(data)
    if checked:
        assert "Bad CRC-32" in error_of(read_state_dict, path)
    else:
        assert read_state_dict(path)["x"][500] != 3


EVIL = [
    (".safetensors", claims_2_60_bytes),
    (".safetensors", tensor_of_2_60_bytes),
    (".safetensors", overlapping_tensors),
    (".safetensors", backward_offsets),
    (".safetensors", path_like_names),
    (".safetensors", duplicate_keys),
    (".safetensors", wrong_dtype),
    (".safetensors", integers_for_weights),
    (".safetensors", eight_bit_floats),
    (".safetensors", deep_header),
    (".safetensors", huge_header),
    (".safetensors", negative_shape),
    (".pth", zip_bomb),
    (".pth", many_entries),
    (".pth", two_pickles),
    (".pth", pickle_of_many_objects),
    (".pth", pickle_that_allocates),
    (".pth", repeated_number),
    (".pth", code_in_a_pickle),
    (".pth", bare_pickle),
]


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """By name: the evil file, what was in its folder, and how its conversion ended.

    One process converts them all: starting one takes seconds.
    """
    pytest.importorskip("torch")
    made = {}
    for suffix, make in EVIL:
        path = tmp_path_factory.mktemp(make.__name__) / f"evil{suffix}"
        make(path)
        made[make.__name__] = path, [*path.parent.iterdir()]
    program = places.SUPPORT / "measured_conversions.py"
    command = [sys.executable, program, *(path for path, _ in made.values())]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(lines) == len(made), "the process crashed at the first one missing"
    return {name: (*made[name], *line) for name, line in zip(made, lines, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the peak memory")
@pytest.mark.parametrize("name", [make.__name__ for _, make in EVIL])
def test_evil_file_ends_in_one_line_within_its_memory(name, evil):
    path, before, code, error, growth = evil[name]
    assert code == 2
    assert error.startswith(f"error: {path}: ")
    assert error.count("\n") == 1 and len(error) < 1000
    assert growth < 2 * path.stat().st_size + 64 * 2**20
    # Neither code was run nor anything written.
    assert [*path.parent.iterdir()] == before
