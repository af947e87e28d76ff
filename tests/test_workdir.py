"""experiments/workdir.py: what a run stores, and what a second start makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import config as config_files
from experiments import workdir as workdir_module
from experiments.workdir import FREE_KEYS, Workdir, write_text


def config(**changes):
    changed = config_files.load("tiny.py")
    changed.update(changes)
    return changed


def started(path: Path, **changes) -> Workdir:
    """A workdir in which a run of tiny.py was started and its factors computed."""
    workdir = Workdir(str(path))
    workdir.settle_config(config(**changes), images_per_step=3)
    workdir.frozen.mkdir()
    return workdir


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- The folder -----------------------------------------------------------------------


def test_the_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    workdir = Workdir(str(tmp_path / "a" / "b"))
    assert workdir.path == tmp_path / "a" / "b"
    assert listing(workdir.path) == []
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


# --- The config -----------------------------------------------------------------------


def test_the_first_start_stores_the_config_with_images_per_step(tmp_path):
    first = config(images_per_step=0, lr=0.125)
    Workdir(str(tmp_path)).settle_config(first, images_per_step=8)
    assert first.images_per_step == 8
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == first.to_dict()
    assert listing(tmp_path) == ["config.json"]


def test_images_per_step_of_the_config_goes_before_the_devices(tmp_path):
    first = config(images_per_step=2)
    Workdir(str(tmp_path)).settle_config(first, images_per_step=8)
    assert first.images_per_step == 2


def test_another_start_takes_images_per_step_from_the_first(tmp_path):
    workdir = started(tmp_path, images_per_step=0)
    again = config(images_per_step=0)
    workdir.settle_config(again, images_per_step=8)  # on more devices
    assert again.images_per_step == 3


def test_a_changed_config_is_refused_with_all_differences(tmp_path):
    workdir = started(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError) as caught:
        workdir.settle_config(
            config(lr=0.5, data="photos", log_every=7), images_per_step=3
        )
    assert str(caught.value) == (
        f"{tmp_path} holds a run with another config: data was 'sample' and is "
        "'photos'; lr was 0.02 and is 0.5. Choose another --workdir, or go on with "
        "what it was started with."
    )
    with pytest.raises(ValueError, match="images_per_step was 3 and is 2"):
        workdir.settle_config(config(images_per_step=2), images_per_step=3)
    assert (tmp_path / "config.json").read_bytes() == before


def test_every_key_is_either_free_or_held(tmp_path):
    """A key that changes the result must not slip through, nor a free one be held."""
    workdir = started(tmp_path)
    for key, value in config().items():
        other = {bool: True, int: 77, float: 0.77, str: "other"}[type(value)]
        other = not value if isinstance(value, bool) else other
        changed = config(**{key: other})
        if key in FREE_KEYS:
            workdir.settle_config(changed, images_per_step=3)
            continue
        with pytest.raises(ValueError, match=f"{key} was .* and is "):
            workdir.settle_config(changed, images_per_step=3)
    assert set(FREE_KEYS) <= set(config().keys())


def test_before_anything_is_computed_the_config_may_still_change(tmp_path):
    """A first start that ended with an error must not tie the folder to its mistake."""
    workdir = Workdir(str(tmp_path))
    workdir.settle_config(config(model="dinov2_vits14"), images_per_step=1)
    workdir.settle_config(config(lr=0.5), images_per_step=1)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model"], stored["lr"]) == ("planted", 0.5)


# --- States ---------------------------------------------------------------------------


def test_states_come_back_and_only_the_last_two_are_kept(tmp_path):
    workdir = Workdir(str(tmp_path))
    assert workdir.load_state() is None
    for position in (9, 20, 100):
        saved = {"eps": {"attn": {"v": np.full((2, 3), position, np.float32)}}}
        workdir.save_state(position, saved)
    assert listing(tmp_path / "states") == ["00000020", "00000100"]
    loaded = workdir.load_state()
    np.testing.assert_array_equal(loaded["eps"]["attn"]["v"], np.full((2, 3), 100.0))
    assert loaded["eps"]["attn"]["v"].dtype == np.float32


def test_a_state_that_is_there_is_kept(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.save_state(5, {"x": np.zeros(1)})
    workdir.save_state(5, {"x": np.ones(1)})
    np.testing.assert_array_equal(workdir.load_state()["x"], [0.0])


def test_what_a_killed_write_left_behind_is_no_state(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.save_state(5, {"x": np.zeros(1)})
    (tmp_path / "states" / ".00000009.abc" / "00000009").mkdir(parents=True)
    np.testing.assert_array_equal(workdir.load_state()["x"], [0.0])


# --- Metrics --------------------------------------------------------------------------


def test_lines_are_read_back_in_order(tmp_path):
    workdir = Workdir(str(tmp_path))
    assert workdir.read_metrics() == []
    rows = [{"image": i, "loss": None if i else 0.1} for i in range(5)]
    workdir.append_metrics(rows[:2])
    workdir.append_metrics([])
    workdir.append_metrics(rows[2:])
    assert workdir.read_metrics() == rows
    assert len(workdir.metrics.read_text().splitlines()) == 5


@pytest.mark.parametrize("position, left", [(0, 0), (3, 3), (5, 5), (9, 5)])
def test_rewinding_drops_the_lines_that_come_again(position, left, tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.append_metrics({"image": i} for i in range(5))
    whole = workdir.metrics.read_bytes()
    workdir.rewind_metrics(position)
    assert workdir.read_metrics() == [{"image": i} for i in range(left)]
    assert whole.startswith(workdir.metrics.read_bytes())  # the very bytes


def test_a_line_that_a_kill_cut_is_dropped_before_others_follow(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.append_metrics({"image": i} for i in range(3))
    with workdir.metrics.open("a") as file:
        file.write('{"image": 3, "lo')
    assert [row["image"] for row in workdir.read_metrics()] == [0, 1, 2]
    workdir.rewind_metrics(3)
    workdir.append_metrics([{"image": 3}])
    assert [row["image"] for row in workdir.read_metrics()] == [0, 1, 2, 3]


# --- Whole or not at all --------------------------------------------------------------


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir_module.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and listing(tmp_path) == ["summary.json"]


def test_the_module_lists_the_files_it_writes(tmp_path):
    workdir = Workdir(str(tmp_path))
    text = workdir_module.__doc__
    for path in (workdir.frozen, workdir.metrics, workdir.pictures, workdir.summary):
        assert path.name in text
