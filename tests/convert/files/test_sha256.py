"""The side file of a file of weights."""

import subprocess

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
    for text in ("nothing", f"{'0' * 64}  ../../etc/passwd\n", f"{'0' * 64} model\n"):
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
