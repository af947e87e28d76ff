"""storage/paths.py: home folders; buckets are tested where they are used."""

from pathlib import Path

import pytest

from experiments.run.workdir import Workdir
from photos import save_noise
from sinder_jax.data import listing
from sinder_jax.storage import paths


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_tilde_at_the_start_of_a_text_is_the_home_folder(home):
    assert paths.as_path("~/runs") == home / "runs"
    assert paths.as_path("~") == home
    assert paths.as_path("a/~") == Path("a/~")
    assert paths.as_path("./~x") == Path("~x")
    assert paths.as_path(Path("~x")) == Path("~x")  # as pathlib
    with pytest.raises(ValueError, match="no home folder ~nobody_of_this_name"):
        paths.as_path("~nobody_of_this_name/x")


def test_a_workdir_in_the_home_folder_is_there_and_nowhere_else(home, tmp_path):
    with Workdir("~/run") as workdir:
        assert workdir.path == home / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("spec", ["~/photos", "folder:~/photos", "list:~/photos.txt"])
def test_photographs_are_found_in_the_home_folder(spec, home):
    save_noise(home / "photos" / "a.png")
    (home / "photos.txt").write_text("~/photos/a.png\n")
    (found,) = listing.open_photographs(spec)
    assert found.name == str(home / "photos" / "a.png")
    found.read()
