"""The side file of a file of weights."""

import os
import subprocess

import numpy as np
import pytest

from convert.files import sha256, writing
from samples import (
    SMALL,
    error_of,
    random_state,
)

SUFFIXES = [".pth", ".pt", ".safetensors"]


def file_with(suffix, folder):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    return folder / f"model{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sha256sum_accepts_the_side_file(suffix, tmp_path):
    path = file_with(suffix, tmp_path)
    writing.write_state_dict(path, random_state(SMALL["mlp"]))
    command = ["sha256sum", "--strict", "-c", f"{path.name}.sha256"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0 and f"{path.name}: OK" in ended.stdout
    assert sha256.check(path)


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
@pytest.mark.parametrize(
    "raw",
    [
        b"caf\xe9",
        b"a\nb",
        b"a\\nb\\",
        b"a\rb",
        b" a ",
        b"a\tb",
        "é😀".encode(),
        b"*a(b) = c",
    ],
    ids=["latin-1", "line break", "backslash", "cr", "space", "tab", "utf-8", "marks"],
)
def test_side_files_of_any_name_pass_between_sha256sum_and_us(raw, locale, tmp_path):
    path = tmp_path / os.fsdecode(raw + b".safetensors")
    writing.write_state_dict(path, {"a": np.zeros(3, np.float32)})
    side = os.fsencode(sha256.side_file(path).name)
    ours = {"cwd": tmp_path, "env": os.environ | {"LC_ALL": locale}, "check": True}
    subprocess.run(["sha256sum", "--strict", "--status", "-c", "--", side], **ours)
    for options in ([], ["--binary"], ["--tag"]):
        command = ["sha256sum", *options, "--", os.fsencode(path.name)]
        lines = subprocess.run(command, capture_output=True, **ours).stdout
        sha256.side_file(path).write_bytes(lines)
        assert sha256.check(path) == {path: sha256.of_file(path)}


def test_digests_may_be_in_capitals_and_lines_end_as_on_windows(tmp_path):
    path = tmp_path / "model.safetensors"
    writing.write_state_dict(path, {"a": np.zeros(3, np.float32)})
    digest = sha256.of_file(path)
    sha256.side_file(path).write_text(f"{digest.upper()} *{path.name}\r\n", newline="")
    assert sha256.check(path) == {path: digest}


def test_changed_bytes_contradict_the_side_file(tmp_path):
    path = tmp_path / "model.safetensors"
    writing.write_state_dict(path, random_state(SMALL["mlp"]))
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert "model.safetensors: damaged" in error_of(sha256.check, path)


def test_a_side_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    writing.write_state_dict(path, random_state(SMALL["mlp"]))
    for text in (
        "",
        "\n",
        "nothing",
        f"{'0' * 64}  ../../etc/passwd\n",
        f"{'0' * 64} model\n",
    ):
        sha256.side_file(path).write_text(text)
        assert "damaged" in error_of(sha256.check, path)


def test_stale_side_file_is_not_left_beside_a_new_file(tmp_path):
    path = tmp_path / "model.safetensors"
    sha256.side_file(path).write_text("of another file")
    state = random_state(SMALL["mlp"])
    error_of(writing.write_state_dict, path, state, kind=FileExistsError)
    assert not path.exists()
    writing.write_state_dict(path, state, overwrite=True)
    assert sha256.check(path)
