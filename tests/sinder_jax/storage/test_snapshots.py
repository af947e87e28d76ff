"""storage/snapshots.py: a run's states survive kills, full disks and flipped bits."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bucket as buckets
import flushing
import places
from numbered import tree
from sinder_jax import checkpoint, param_tree
from sinder_jax.storage import errors, orbax_io, run_files
from sinder_jax.storage.snapshots import Snapshots

SRC = places.ROOT


def listing(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def assert_is(newest, number):
    assert newest is not None and newest.path.name == f"{number:08d}"
    want = param_tree.flatten(tree(number))
    got = param_tree.flatten(newest.tree)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Saving ---------------------------------------------------------------------------


def test_arrays_may_change_as_soon_as_save_returns(tmp_path):
    saved = tree(7)
    with Snapshots(tmp_path) as kept:
        kept.save(7, saved)
        for array in param_tree.flatten(saved).values():
            array.fill(99)
        kept.wait()
        assert_is(kept.load_newest(), 7)


def test_jax_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 + 99, donate_argnums=0)
    saved = jax.tree.map(jnp.asarray, tree(7))
    with Snapshots(tmp_path) as kept:
        kept.save(7, saved)
        jax.block_until_ready(jax.tree.map(overwrite, saved))
        assert_is(kept.load_newest(), 7)


def test_a_state_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    log = flushing.watch(monkeypatch)
    with Snapshots(tmp_path, keep_last=1) as kept:
        for number in (7, 8):
            kept.save(number, tree(number))
            kept.wait()
            log.assert_flushed_before(tmp_path / f"{number:08d}")


def test_metadata_comes_back_with_versions_and_number(tmp_path):
    with Snapshots(tmp_path) as kept:
        kept.save(7, tree(7), {"config": {"lr": 0.5}, "seed": 3})
        found = kept.load_newest().metadata
    assert found["config"] == {"lr": 0.5} and found["seed"] == 3
    assert found["num_images"] == 7
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"].keys() >= {"sinder_jax", "orbax", "python", "numpy"}


def test_a_state_is_a_checkpoint_as_any_other(tmp_path):
    with Snapshots(tmp_path) as kept:
        kept.save(7, tree(7), {"seed": 3})
    found, metadata = checkpoint.load_tree(tmp_path / "00000007")
    assert metadata["seed"] == 3
    np.testing.assert_array_equal(found["num_images"], 7)
    assert not list(tmp_path.rglob("*.pkl"))


def test_states_written_before_are_read_and_go_in_time(tmp_path):
    for number in (5, 6):
        checkpoint.save_tree(tmp_path / f"{number:08d}", tree(number), {})
    with Snapshots(tmp_path) as kept:
        assert_is(kept.load_newest(), 6)
        kept.save(8, tree(8))
    assert listing(tmp_path) == ["00000006", "00000008"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, [60]), (2, 0, [50, 60]), (9, 0, [10, 20, 30, 40, 50, 60])]
    + [(1, 20, [20, 40, 60]), (2, 30, [30, 50, 60])],
)
def test_the_last_and_the_multiples_are_kept(keep_last, keep_every, left, tmp_path):
    with Snapshots(tmp_path, keep_last=keep_last, keep_every=keep_every) as kept:
        for number in range(10, 70, 10):
            kept.save(number, tree(number))
    assert listing(tmp_path) == [f"{number:08d}" for number in left]


def test_a_state_that_is_there_is_left_as_it_is(tmp_path):
    with Snapshots(tmp_path) as kept:
        kept.save(7, tree(7))
        kept.save(7, tree(8))
        assert_is(kept.load_newest(), 7)


def test_what_cannot_be_stored_is_refused_at_once(tmp_path):
    with Snapshots(tmp_path) as kept:
        with pytest.raises(ValueError, match="JSON"):
            kept.save(7, tree(7), {"x": np.ones(2)})
        with pytest.raises(ValueError, match="nonempty"):
            kept.save(7, {"a": np.ones((0, 3))})
        assert kept.load_newest() is None
    with pytest.raises(ValueError, match="keep_last"):
        Snapshots(tmp_path, keep_last=0)


def test_only_process_0_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(RuntimeError, match="process 1 must leave saving to process 0"):
        Snapshots(tmp_path)
    assert listing(tmp_path) == []


# --- Damage ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    with Snapshots(folder, keep_last=3) as kept:
        for number in (10, 20, 30):
            kept.save(number, tree(number))
    return folder


@pytest.fixture
def folder(three, tmp_path):
    """A copy of three states, to damage."""
    return Path(shutil.copytree(three, tmp_path / "states"))


def test_no_flipped_bit_of_any_file_is_taken_for_a_state(folder):
    rng = np.random.default_rng(0)
    passed_over = set()
    files = [path for path in (folder / "00000030").rglob("*") if path.is_file()]
    assert len(files) >= 8
    for file in files:
        whole = file.read_bytes()
        for _ in range(3):
            data = bytearray(whole)
            bit = int(rng.integers(8 * len(whole)))
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            newest = checkpoint.load_newest(folder)
            assert_is(newest, 20 if newest.damaged else 30)
            if newest.damaged:
                passed_over.add(file.name)
        file.write_bytes(whole)
    assert passed_over >= {"0.0", ".zarray", "metadata"}


@pytest.mark.parametrize("damage", ["deleted", "empty", "half"])
def test_no_cut_file_is_taken_for_a_state(damage, folder):
    for file in sorted((folder / "00000030").rglob("*")):
        if not file.is_file():
            continue
        whole = file.read_bytes()
        kept = {"empty": b"", "half": whole[: len(whole) // 2]}
        file.unlink() if damage == "deleted" else file.write_bytes(kept[damage])
        newest = checkpoint.load_newest(folder)
        assert_is(newest, 20 if newest.damaged else 30)
        file.write_bytes(whole)


def flip(path):
    (chunk,) = (path / "arrays_0" / "eps.attn.v").glob("[0-9]*")
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)


def test_a_damaged_state_is_set_aside_and_its_number_is_free_again(folder):
    flip(folder / "00000030")
    with Snapshots(folder, keep_last=2) as kept:
        newest = kept.load_newest()
        assert_is(newest, 20)
        ((path, error),) = newest.damaged.items()
        assert path.name == "00000030" and "eps/attn/v" in str(error)
        assert kept.set_aside(path).name == "00000030.damaged"
        assert_is(kept.load_newest(), 20)
        kept.save(30, tree(30))
        assert_is(kept.load_newest(), 30)
    assert listing(folder) == ["00000020", "00000030", "00000030.damaged"]
    flip(folder / "00000030")  # and once more
    with Snapshots(folder) as kept:
        kept.set_aside(folder / "00000030")
        assert_is(kept.load_newest(), 20)


def test_where_all_are_damaged_nothing_is_taken(folder):
    for path in run_files.numbered(folder):
        flip(path)
    with Snapshots(folder) as kept:
        with pytest.raises(errors.DamagedError, match="none of its") as caught:
            kept.load_newest()
    one_line(caught)


# --- Kills ----------------------------------------------------------------------------


def test_what_a_kill_left_is_no_state_and_goes_with_the_next_start(folder):
    shutil.copytree(folder / "00000030", folder / "00000040.orbax-checkpoint-tmp")
    assert_is(checkpoint.load_newest(folder), 30)
    with Snapshots(folder, keep_last=9) as kept:
        assert_is(kept.load_newest(), 30)
        kept.save(50, tree(50))
    assert listing(folder) == ["00000010", "00000020", "00000030", "00000050"]


@pytest.mark.slow
def test_kills_at_random_moments_lose_one_state_at_most(tmp_path):
    """Nothing that was saved is lost, and nothing half saved is ever taken."""
    rng, reached = random.Random(0), 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, places.SUPPORT / "endless_saver.py", tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=SRC,
        )
        lines = [process.stdout.readline().split()]
        assert lines[0], process.communicate()[1]
        time.sleep(rng.uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert not errors
        lines += [line.split() for line in rest.splitlines()]
        assert lines[0] == ["from", str(reached)]
        saved = max(reached, *(int(number) for _, number in lines))
        newest = checkpoint.load_newest(tmp_path)
        if newest is None:
            assert saved == 0
            continue
        assert not newest.damaged
        reached = int(newest.tree["num_images"])
        assert_is(newest, reached)
        # The one that was under way may be there, too.
        assert saved <= reached <= saved + 2
    assert reached  # how far depends on the machine


# --- Full, read-only and vanished disks -----------------------------------------------


def test_a_file_that_cannot_grow_is_told_in_one_line_within_seconds(tmp_path):
    """A limit on the size of files stands for a full disk: the same call fails."""
    done = subprocess.run(
        [sys.executable, places.SUPPORT / "saver_on_a_full_disk.py", tmp_path],
        capture_output=True,
        text=True,
        cwd=SRC,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no traceback of a thread
    assert done.stdout == (
        f"{tmp_path}: the state after 2 images could not be saved (File too large); "
        "earlier ones are untouched\n"
    )
    assert listing(tmp_path) == ["00000003", "00000004"]


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["mkdir", "write_text"])
def test_a_full_disk_leaves_the_last_good_state(where, tmp_path, monkeypatch):
    with Snapshots(tmp_path, keep_last=1) as kept:
        kept.save(1, tree(1))
        kept.wait()
        monkeypatch.setattr(f"etils.epath.gpath.PosixGPath.{where}", no_space)
        with pytest.raises(OSError, match="No space left on device") as caught:
            kept.save(2, tree(2))
            kept.wait()
        assert str(tmp_path) in one_line(caught) and "2 images" in str(caught.value)
        monkeypatch.undo()
        assert_is(kept.load_newest(), 1)
        kept.wait()  # it was told
        kept.save(3, tree(3))
    assert listing(tmp_path) == ["00000003"]


def test_arrays_that_are_written_after_the_error_are_removed_too(tmp_path, monkeypatch):
    write = orbax_io._OneByOne._background_serialize

    async def slow(*args):
        await asyncio.sleep(0.5)
        await write(*args)

    with Snapshots(tmp_path) as kept:
        monkeypatch.setattr(orbax_io._OneByOne, "_background_serialize", slow)
        monkeypatch.setattr("etils.epath.gpath.PosixGPath.write_text", no_space)
        with pytest.raises(OSError, match="No space left on device"):
            kept.save(1, tree(1))
            kept.wait()
        monkeypatch.undo()
    assert listing(tmp_path) == []


def test_the_next_save_tells_of_the_one_before(tmp_path, monkeypatch):
    with Snapshots(tmp_path) as kept:
        with monkeypatch.context() as patch:
            patch.setattr("etils.epath.gpath.PosixGPath.rename", no_space)
            kept.save(1, tree(1))
            deadline = time.monotonic() + 10
            while kept._manager.is_saving_in_progress():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        with pytest.raises(OSError, match="after 1 images could not be saved"):
            kept.save(2, tree(2))
        kept.save(2, tree(2))
        assert_is(kept.load_newest(), 2)


def test_a_folder_that_vanished_is_not_made_anew(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    with Snapshots(folder) as kept:
        kept.save(1, tree(1))
        kept.wait()
        shutil.rmtree(folder)
        with pytest.raises(OSError, match="states does not exist") as caught:
            kept.save(2, tree(2))
        one_line(caught)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="states does not exist"):
        Snapshots(folder)


def test_a_folder_that_takes_no_file_is_told():
    # Permission bits do not stop root; /proc takes files from nobody.
    if not Path("/proc/self").is_dir():
        pytest.skip("needs Linux")
    with Snapshots("/proc/self/task") as kept:
        with pytest.raises(OSError, match="/proc/self/task: the state after 1 ") as e:
            kept.save(1, tree(1))
            kept.wait()
    one_line(e)


def test_orbax_is_silent_only_while_states_are_open(tmp_path):
    import logging

    before = list(logging.getLogger("absl").filters)
    with Snapshots(tmp_path):
        assert len(logging.getLogger("absl").filters) == len(before) + 1
    assert logging.getLogger("absl").filters == before


# --- Buckets --------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    return buckets.install(monkeypatch, tmp_path)


def test_states_in_a_bucket_come_back(bucket):
    with Snapshots("gs://b/run/states", keep_every=20) as kept:
        assert kept.load_newest() is None
        for number in (10, 20, 30, 40, 50):
            kept.save(number, tree(number))
        assert_is(kept.load_newest(), 50)
    names = {name.split("/")[3] for name in bucket.objects("b/run/states")}
    assert names == {"00000020", "00000040", "00000050"}
    assert str(checkpoint.load_newest("gs://b/run/states").path) == (
        "gs://b/run/states/00000050"
    )


def test_an_unfinished_state_in_a_bucket_is_passed_over_and_removed(bucket):
    with Snapshots("gs://b/s") as kept:
        kept.save(10, tree(10))
        kept.save(20, tree(20))
    (bucket.place("b/s/00000020") / run_files.COMMITTED).unlink()
    newest = checkpoint.load_newest("gs://b/s")
    assert_is(newest, 10)
    assert not newest.damaged
    with Snapshots("gs://b/s") as kept:
        assert_is(kept.load_newest(), 10)
        kept.save(30, tree(30))
    assert {name.split("/")[2] for name in bucket.objects("b/s")} == {
        "00000010",
        "00000030",
    }


def test_a_damaged_state_in_a_bucket_is_set_aside(bucket):
    with Snapshots("gs://b/s") as kept:
        kept.save(10, tree(10))
        kept.save(20, tree(20))
    flip(bucket.place("b/s/00000020"))
    with Snapshots("gs://b/s") as kept:
        newest = kept.load_newest()
        assert_is(newest, 10)
        for path in newest.damaged:
            kept.set_aside(path)
        kept.save(20, tree(20))
        assert_is(kept.load_newest(), 20)
    assert {name.split("/")[2] for name in bucket.objects("b/s")} == {
        "00000010",
        "00000020",
        "00000020.damaged",
    }


def test_a_header_of_a_state_says_what_it_holds(tmp_path):
    with Snapshots(tmp_path) as kept:
        kept.save(7, tree(7))
    header = json.loads((tmp_path / "00000007/metadata/metadata").read_text())
    assert header["arrays"]["eps/attn/v"]["shape"] == [3, 1000]
    assert all(len(each["sha256"]) == 64 for each in header["arrays"].values())
