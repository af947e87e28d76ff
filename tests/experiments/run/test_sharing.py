"""`Cluster.check_shared`: processes' folders, in the threads of this one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bucket
from experiments.run import cluster
from sinder_jax.storage import paths


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def together(folders, within=0.3):
    """The error of each process, run as threads that meet at every collective call."""
    count = len(folders)
    barrier = threading.Barrier(count)
    slots = [None] * count

    def exchange(number, value):
        slots[number] = value
        barrier.wait(30)
        got = list(slots)
        barrier.wait(30)
        return got

    class Threads(cluster.Cluster):
        def from_first(self, tree):
            return exchange(self.process, tree)[0]

        def gather(self, yes):
            return exchange(self.process, yes)

    def process(number):
        try:
            Threads(number, count).check_shared(folders[number], within)
        except ValueError as error:
            return str(error)

    folders[0].mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(process, range(count)))


def test_one_folder_for_all_processes_is_accepted(tmp_path):
    assert together([tmp_path / "run"] * 3) == [None] * 3
    assert listing(tmp_path / "run") == []


def test_a_folder_of_one_s_own_is_refused_by_all_alike(tmp_path):
    (tmp_path / "b").mkdir()
    errors = together([tmp_path / name for name in ("a", "b", "a", "none")])
    assert len({error.split("one folder")[1] for error in errors}) == 1
    assert "all 4 processes: 1, 3 cannot see what 0 writes" in errors[0]
    assert listing(tmp_path) == ["a", "b"] and listing(tmp_path / "a") == []


def test_a_file_that_shows_late_is_waited_for(tmp_path, monkeypatch):
    """As on a disk whose other users learn of a file only some seconds later."""
    (tmp_path / "late").mkdir()
    real, began = Path.iterdir, time.monotonic()

    def iterdir(path):
        if path == tmp_path / "late" and time.monotonic() < began + 0.5:
            return iter(())
        return real(tmp_path / "run" if path == tmp_path / "late" else path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    folders = [tmp_path / "run", tmp_path / "late"]
    assert together(folders, within=10.0) == [None, None]


def test_a_folder_that_process_0_cannot_write_to_keeps_nobody_waiting(
    tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    errors = together([tmp_path, tmp_path], within=60)
    assert all("0, 1 cannot see" in error for error in errors)


def test_processes_see_each_other_in_a_bucket(tmp_path, monkeypatch):
    objects = bucket.install(monkeypatch, tmp_path / "cloud")
    folder = paths.as_path("gs://b/run")
    assert together([folder] * 2) == [None, None]
    assert objects.objects() == []
