"""storage/files.py: files that are replaced whole or not at all."""

import os

import pytest

import bucket
from sinder_jax.storage import files


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="summary.json cannot be written: No space"):
            files.write(path, "new")
    assert path.read_text() == "old"
    files.write(path, "new")
    assert path.read_text() == "new" and listing(tmp_path) == ["summary.json"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["a.bin"]


def test_a_bucket_gets_every_file_that_was_written_beside(tmp_path, monkeypatch):
    bucket.install(monkeypatch, tmp_path)
    with files.replacing("gs://b/run/a.bin") as partial:
        partial.write_bytes(b"a")
        partial.with_name("a.bin.sha256").write_text("digest")
    files.write("gs://b/run/c.json", "{}")
    assert listing(tmp_path / "b" / "run") == ["a.bin", "a.bin.sha256", "c.json"]


def test_a_partial_folder_of_a_killed_process_with_this_number_is_removed(tmp_path):
    stale = tmp_path / f".made.{os.getpid()}.partial"
    stale.mkdir()
    (stale / "half").touch()
    with files.replacing(tmp_path / "made") as partial:
        partial.mkdir()
        (partial / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"]


def test_an_error_that_names_its_file_is_raised_as_it_is(tmp_path):
    with pytest.raises(OSError, match=r"^other: cannot be written \(full\)$"):
        with files.replacing(tmp_path / "made"):
            raise OSError("other: cannot be written (full)")
    assert not list(tmp_path.iterdir())
