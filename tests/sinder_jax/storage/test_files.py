"""storage/files.py: files that are replaced whole or not at all."""

import errno
import json
import os

import pytest

import bucket
import flushing
from sinder_jax.storage import files, paths


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


def test_text_with_names_that_are_not_utf_8_is_written_as_json_escapes_it(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.jpg")
    files.write(tmp_path / "a.json", json.dumps({"file": name}, ensure_ascii=False))
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{"file": "caf\\udce9 é.jpg"}'
    assert os.fsencode(json.loads(text)["file"]) == b"caf\xe9 \xc3\xa9.jpg"


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


def test_all_bytes_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    log = flushing.watch(monkeypatch)
    files.write(tmp_path / "a.json", "{}")
    with files.replacing(tmp_path / "made") as partial:
        (partial / "deep" / "er").mkdir(parents=True)
        (partial / "deep" / "er" / "x").write_text("x")
    for name in ("a.json", "made"):
        log.assert_flushed_before(tmp_path / name)


def test_a_file_system_that_flushes_no_folder_will_do(tmp_path, monkeypatch):
    """SMB and some FUSE file systems answer EINVAL."""

    def refuse(entry, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{entry}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(entry)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write(tmp_path / "a.json", "{}")
    assert listing(tmp_path) == ["a.json"]


def test_bytes_that_cannot_be_flushed_are_not_published(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="a.json cannot be written: Input/output error"):
        files.write(tmp_path / "a.json", "{}")
    assert listing(tmp_path) == []


LEFT = ["folder", "file", "read-only folder", "link to a folder", "broken link"]


@pytest.mark.parametrize("left", LEFT)
def test_what_a_killed_process_of_this_number_left_stops_nothing(left, tmp_path):
    """In containers every process has the number 1."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    stale = folder / f".made.{os.getpid()}.partial"
    if "link" in left:
        stale.symlink_to(outside if left == "link to a folder" else tmp_path / "none")
    elif left == "file":
        stale.touch(0o400)
    else:
        stale.mkdir()
        (stale / "half").touch()
        stale.chmod(0o500 if left == "read-only folder" else 0o700)
    with files.replacing(folder / "made") as partial:
        partial.mkdir()
    files.write(folder / "made.json", "{}")
    assert (folder / "made").is_dir() and (folder / "made.json").read_text() == "{}"
    assert [x.name for x in outside.iterdir()] == ["kept"]


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX has threads, if a test started it
@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid(), reason="needs root")
def test_what_another_user_left_stops_nothing(tmp_path):
    """Nobody removes from a folder with the sticky bit what somebody else made."""
    tmp_path.chmod(0o1777)
    for above in list(tmp_path.parents)[:3]:
        above.chmod(0o755)
    child = os.fork()
    if not child:
        try:
            stale = tmp_path / f".made.{os.getpid()}.partial"
            stale.mkdir()
            (stale / "half").touch()
            os.setgid(65534)
            os.setuid(65534)
            with files.replacing(tmp_path / "made") as partial:
                partial.mkdir()
            files.write(tmp_path / "made.json", "{}")
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "made").is_dir() and (tmp_path / "made.json").is_file()


def test_files_written_at_once_have_folders_of_their_own(tmp_path):
    with files.replacing(tmp_path / "a") as first:
        first.write_text("first")
        with files.replacing(tmp_path / "b") as second:
            assert first.parent != second.parent
            second.write_text("second")
    assert listing(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_file_is_created_once(place, tmp_path, monkeypatch):
    folder = tmp_path
    if place == "bucket":
        bucket.install(monkeypatch, tmp_path)
        folder = paths.as_path("gs://b")
        assert paths.names(folder) == []
    files.create(folder / "claim", "first")
    with pytest.raises(FileExistsError):
        files.create(folder / "claim", "second")
    assert (folder / "claim").read_text() == "first"
    assert paths.names(folder) == ["claim"]
    assert paths.names(folder / "none") == []
