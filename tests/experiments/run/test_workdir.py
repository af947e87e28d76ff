"""run/workdir.py: what a run stores, and what a second start makes of it."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import bucket as buckets
from experiments.run import first_start
from experiments.run.workdir import Workdir, check_free
from rows import STRANGE, line, row
from samples import error_of
from sinder_jax import checkpoint
from sinder_jax.storage import run_files
from small_runs import config, names, started

# --- The folder -----------------------------------------------------------------------


def test_the_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    workdir = Workdir(str(tmp_path / "a" / "b"))
    assert workdir.path == tmp_path / "a" / "b"
    workdir.close()
    assert list(workdir.path.iterdir()) == []
    Workdir(str(tmp_path / "a" / "b"))  # a second start


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_raises_with_its_path(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError) as caught:
        Workdir(str(tmp_path / name))
    assert str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_takes_no_file_raises():
    # Permission bits do not stop root; /proc takes files from nobody.
    if not Path("/proc/self").is_dir():
        pytest.skip("needs Linux")
    with pytest.raises(OSError):
        Workdir("/proc/self")


def test_a_workdir_that_something_else_uses_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    for free in ("none", ".", "notes.txt"):  # `Workdir` says that it is no folder
        check_free(tmp_path / free)
    started(tmp_path / "run").close()
    check_free(tmp_path / "run")
    for name in (run_files.SUMMARY, run_files.CONFIG):
        (tmp_path / "run" / name).write_text('{"hidden_size": 384}')
        assert error_of(check_free, tmp_path / "run") == (
            f"{tmp_path / 'run'} holds a {name} of something else: choose another "
            "--workdir"
        )


# --- States ---------------------------------------------------------------------------


def test_states_come_back_and_only_the_last_two_are_kept(tmp_path):
    workdir = Workdir(str(tmp_path))
    assert workdir.load_state() is None
    for position in (9, 20, 100):
        saved = {"eps": {"attn": {"v": np.full((2, 3), position, np.float32)}}}
        workdir.save_state(position, saved)
    loaded = workdir.load_state().tree
    assert names(tmp_path / "states") == ["00000020", "00000100"]
    np.testing.assert_array_equal(loaded["eps"]["attn"]["v"], np.full((2, 3), 100.0))
    assert loaded["eps"]["attn"]["v"].dtype == np.float32


def test_a_state_that_is_there_is_kept(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.save_state(5, {"x": np.zeros(1)})
    workdir.save_state(5, {"x": np.ones(1)})
    np.testing.assert_array_equal(workdir.load_state().tree["x"], [0.0])


def test_what_a_killed_write_left_behind_is_no_state(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.save_state(5, {"x": np.zeros(1)})
    (tmp_path / "states" / ".00000009.abc" / "00000009").mkdir(parents=True)
    np.testing.assert_array_equal(workdir.load_state().tree["x"], [0.0])


def test_a_state_keeps_the_config_and_the_position(tmp_path):
    workdir = started(tmp_path, lr=0.5)
    workdir.save_state(5, {"x": np.zeros(1)})
    workdir.close()
    _, metadata = checkpoint.load_tree(tmp_path / "states" / "00000005")
    assert metadata["config"]["lr"] == 0.5 and metadata["config"]["seed"] == 1
    assert metadata["position"] == 5
    assert "jax" in metadata["versions"]


def test_a_damaged_state_is_set_aside_with_a_warning(tmp_path, capsys):
    with Workdir(tmp_path) as workdir:
        for position in (5, 6):
            workdir.save_state(position, {"x": np.full(9, position)})
    (chunk,) = (tmp_path / "states/00000006/arrays_0/x").glob("[0-9]*")
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"!")
    with Workdir(tmp_path) as workdir:
        assert workdir.load_state().tree["x"][0] == 5
    (warning,) = capsys.readouterr().err.splitlines()
    assert "00000006.damaged, going on from the one before, 00000005" in warning
    assert names(tmp_path / "states") == ["00000005", "00000006.damaged"]


def test_more_states_are_kept_where_asked(tmp_path):
    with Workdir(tmp_path, keep_last=1, keep_every=4) as workdir:
        for position in range(2, 12, 2):
            workdir.save_state(position, {"x": np.zeros(1)})
    assert names(tmp_path / "states") == ["00000004", "00000008", "00000010"]


def test_a_process_that_does_not_write_makes_nothing(tmp_path):
    reader = Workdir(tmp_path / "run", writes=False)
    assert run_files.read_metrics(reader.path) == []
    assert reader.read_summary() == {}
    for write in (
        lambda: reader.load_state(),
        lambda: reader.save_state(1, {"x": np.zeros(1)}),
        lambda: reader.append_metrics([row(1)]),
        lambda: reader.rewind_metrics(0),
        lambda: reader.write_summary({}),
    ):
        with pytest.raises(RuntimeError, match="leave writing"):
            write()
    reader.close()
    assert names(tmp_path) == []


def test_a_workdir_that_was_removed_is_not_made_anew(tmp_path):
    """In no part: not even where the background still wrote when it went."""
    path = tmp_path / "run"
    workdir = started(path)
    workdir.save_state(5, {"x": np.zeros(1)})
    workdir.wait()
    shutil.rmtree(path)
    for leftover in (None, path / "states"):
        if leftover is not None:
            leftover.mkdir(parents=True)
        for write in (
            lambda: workdir.save_state(6, {"x": np.zeros(1)}),
            lambda: workdir.append_metrics([row(5)]),
            lambda: workdir.rewind_metrics(0),
            lambda: workdir.write_summary({"finished": True}),
        ):
            with pytest.raises(OSError, match="was removed during the run") as caught:
                write()
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    workdir.close()
    assert names(path) == ["states"] and names(path / "states") == []


def test_a_state_that_could_not_be_written_is_told_with_the_next_lines(
    tmp_path, monkeypatch
):
    """Not hours later, with the next state."""
    workdir = started(tmp_path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.gpath.PosixGPath.rename", fail)
        workdir.save_state(5, {"x": np.zeros(1)})
        with pytest.raises(OSError, match="No space left on device"):
            for image in range(1000):
                time.sleep(0.01)
                workdir.append_metrics([row(image)])
    assert image < 500
    workdir.append_metrics([row(image)])
    workdir.close()


# --- Metrics --------------------------------------------------------------------------


def test_lines_are_read_back_in_order(tmp_path):
    workdir = Workdir(str(tmp_path))
    assert run_files.read_metrics(workdir.path) == []
    rows = [row(i, loss=None if i else 0.1) for i in range(5)]
    workdir.append_metrics(rows[:2])
    workdir.append_metrics([])
    workdir.append_metrics(rows[2:])
    assert run_files.read_metrics(workdir.path) == rows
    assert len(workdir.metrics.read_text().splitlines()) == 5


@pytest.mark.parametrize("position, left", [(0, 0), (3, 3), (5, 5), (9, 5)])
def test_rewinding_drops_the_lines_that_come_again(position, left, tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.append_metrics(row(i) for i in range(5))
    whole = workdir.metrics.read_bytes()
    workdir.rewind_metrics(position)
    assert run_files.read_metrics(workdir.path) == [row(i) for i in range(left)]
    assert whole.startswith(workdir.metrics.read_bytes())  # the very bytes


def test_a_line_that_a_kill_cut_is_dropped_before_others_follow(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.append_metrics(row(i) for i in range(3))
    with workdir.metrics.open("a") as file:
        file.write('{"image": 3, "lo')
    assert [row["image"] for row in run_files.read_metrics(workdir.path)] == [0, 1, 2]
    workdir.rewind_metrics(3)
    workdir.append_metrics([row(3)])
    assert [row["image"] for row in run_files.read_metrics(workdir.path)] == [
        0,
        1,
        2,
        3,
    ]


def test_a_strange_line_is_dropped_and_told_once(tmp_path, capsys):
    workdir = Workdir(str(tmp_path))
    good = [line(i) for i in range(12) if i not in (4, 7, 8)]
    strange = [STRANGE["zeros"], *good[:6], STRANGE["cut"], *reversed(good[3:])]
    workdir.metrics.write_bytes(b"".join(strange) + line(12) + line(300))
    workdir.rewind_metrics(12)
    assert workdir.metrics.read_bytes() == b"".join(good)
    workdir.write_summary({"finished": True, "images": 12})
    (told,) = capsys.readouterr().err.splitlines()
    assert told == (f"warning: {tmp_path}: metrics.jsonl lacks 3 of 12 images: 4, 7-8")


def test_a_full_disk_names_the_metrics(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    workdir.append_metrics([row(0)])
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux")
    monkeypatch.setattr(workdir, "metrics", Path("/dev/full"))
    with pytest.raises(OSError, match="/dev/full cannot be written: No space left"):
        workdir.append_metrics([row(1)])


# --- The end --------------------------------------------------------------------------


def test_a_run_is_finished_when_its_summary_says_so(tmp_path, capsys):
    workdir = Workdir(tmp_path)
    assert workdir.read_summary() == {}
    for finished in (False, True):
        values = {"finished": finished, "images": 0}
        workdir.write_summary(values)
        assert Workdir(tmp_path, writes=False).read_summary() == values
    assert capsys.readouterr().err == ""
    for damage in (b"", b'{"finished": true', b"\0" * 30, b"\xff", b"[]"):
        workdir.summary.write_bytes(damage)
        assert workdir.read_summary() == {}
        (told,) = capsys.readouterr().err.splitlines()
        assert "summary.json is damaged" in told


def test_an_output_is_a_file_of_the_workdir(tmp_path):
    workdir = Workdir(tmp_path)
    with workdir.output("pictures/a.png") as path:
        assert path.name == "a.png"
        path.write_bytes(b"png")
        assert not (tmp_path / "pictures" / "a.png").exists()  # until it is whole
    assert (tmp_path / "pictures" / "a.png").read_bytes() == b"png"


# --- Buckets --------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    return buckets.install(monkeypatch, tmp_path / "cloud")


def test_a_run_in_a_bucket_is_stored_and_goes_on(bucket, tmp_path, monkeypatch):
    """From config to summary, with a kill after the second state."""
    monkeypatch.chdir(tmp_path)  # nothing is to appear in a folder of this name
    place = "gs://b/runs/one"
    with Workdir(place) as workdir:
        first_start.settle_config(workdir, config(lr=0.5), images_per_step=3)
        assert not workdir.frozen.exists()
        checkpoint.save_tree(workdir.frozen, {"x": np.ones(3)}, {})
        for image in range(8):
            workdir.append_metrics([row(image)])
            if image in (2, 5):
                workdir.save_state(image + 1, {"x": np.full(4, image + 1)})
        workdir.wait()
        written = bucket.place(f"{place}/metrics.jsonl").read_text()
        assert len(written.splitlines()) == 6  # up to the state
        bucket.stop_after(0)
        with pytest.raises(buckets.Killed):
            workdir.close()
        bucket.stop_after(None)

    again = Workdir(place)
    first_start.settle_config(again, config(lr=0.5), images_per_step=1)
    with pytest.raises(ValueError, match="lr was 0.5 and is 0.25"):
        first_start.settle_config(again, config(lr=0.25), images_per_step=1)
    assert again.load_state().tree["x"][0] == 6
    again.append_metrics([row(6), row(7)])
    again.rewind_metrics(6)
    again.append_metrics([row(6)])
    reader = Workdir(place, writes=False)
    assert checkpoint.load_newest(reader.states).tree["x"][0] == 6
    with again.output("pictures/a.png") as path:
        path.write_bytes(b"png")
    with again.output("repaired") as path:
        path.mkdir()
        (path / "weights").write_bytes(b"1")
    again.write_summary({"finished": True})
    again.close()
    assert [row["image"] for row in run_files.read_metrics(reader.path)] == list(
        range(7)
    )
    assert reader.read_summary() == {"finished": True}
    tops = {name.split("/")[3] for name in bucket.objects("b/runs/one")}
    assert tops == {
        "claims",
        "config.json",
        "frozen",
        "metrics.jsonl",
        "pictures",
        "repaired",
    } | {
        "states",
        "summary.json",
    }
    assert bucket.place(f"{place}/pictures/a.png").read_bytes() == b"png"
    assert bucket.place(f"{place}/repaired/weights").read_bytes() == b"1"
    assert names(tmp_path) == ["cloud"]


def test_a_bucket_that_something_else_uses_is_refused(bucket):
    place = "gs://b/runs/one"
    check_free(place)
    with Workdir(place) as workdir:
        first_start.settle_config(workdir, config(), images_per_step=3)
        workdir.write_summary({"finished": True})
    check_free(place)
    bucket.place(f"{place}/config.json").write_text('{"protocol": "knn"}')
    assert error_of(check_free, place) == (
        f"{place} holds an evaluation (knn): choose another --workdir"
    )


def test_a_bucket_that_takes_nothing_is_told(bucket, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Anonymous caller\nmay not write")

    monkeypatch.setattr(bucket, "put_object", refuse)
    with pytest.raises(OSError, match="--workdir=gs://b/run cannot be written") as e:
        Workdir("gs://b/run")
    assert "may not write" in str(e.value) and "\n" not in str(e.value)


def test_a_run_that_lost_its_states_says_that_it_starts_again(tmp_path, capsys):
    with Workdir(tmp_path) as workdir:
        workdir.rewind_metrics(0)
        workdir.append_metrics([row(0), row(1)])
        assert capsys.readouterr().err == ""
        workdir.rewind_metrics(0)
    line = f"warning: {tmp_path} holds no state: starting again from image 0\n"
    assert capsys.readouterr().err == line
    assert not run_files.read_metrics(tmp_path)
