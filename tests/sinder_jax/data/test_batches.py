"""batches.py: the training list, the stream of batches and who reads it."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import places
from photos import FAMILY, crop, normalize, save_noise, write_dataset
from sinder_jax.data import batches, decode, listing

# --- The training list ----------------------------------------------------------------


@pytest.mark.parametrize(
    "total, wanted, step",
    [(10, 3, 3), (10, 10, 1), (10, 30_000, 1), (9, 2, 4), (1_281_167, 30_000, 42)],
)
def test_training_list_takes_every_nth_file(total, wanted, step):
    chosen = batches.training_list(range(total), wanted)
    assert chosen == list(range(0, total, step))


def test_training_list_of_nothing_raises():
    with pytest.raises(ValueError, match="got num_images=0"):
        batches.training_list(range(1), 0)


@pytest.mark.parametrize("total, wanted", [(10, 3), (10, 10), (10, 30_000), (9, 2)])
def test_held_out_is_what_is_not_on_the_training_list(total, wanted):
    rest = batches.held_out(range(total), wanted)
    chosen = batches.training_list(range(total), wanted, shuffle_seed=3)
    assert sorted(chosen + rest) == list(range(total)) and rest == sorted(rest)


def test_shuffling_permutes_the_thinned_list():
    plain = batches.training_list(range(1000), 100)
    shuffled = batches.training_list(range(1000), 100, shuffle_seed=1)
    assert shuffled != plain and sorted(shuffled) == plain
    assert batches.training_list(range(1000), 100, shuffle_seed=1) == shuffled
    assert batches.training_list(range(1000), 100, shuffle_seed=2) != shuffled
    assert batches.training_list(range(1000), 100, shuffle_seed=0) == plain


def test_a_seed_gives_the_order_it_always_gave():
    """Written down: a run that goes on must find its photographs where they were."""
    order = batches.training_list(range(10), 10, shuffle_seed=1)
    assert order == [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]


# --- The stream -----------------------------------------------------------------------

SIZE = 28


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        save_noise(tmp_path / f"{i}.png", width=30 + 3 * i, height=40 - i, seed=i)
    return listing.open_photographs(str(tmp_path))


def stream(photographs, size, **options):
    """A stream for DINOv2, see `batches.stream`."""
    return batches.stream(
        photographs,
        size,
        patch_size=FAMILY.patch_size,
        statistics=FAMILY.statistics,
        **options,
    )


def take(reading, batches: int) -> list[batches.Batch]:
    taken = list(itertools.islice(reading, batches))
    reading.close()
    return taken


def test_stream_walks_the_list_cyclically(photos):
    taken = take(stream(photos, SIZE, batch_size=3), 4)
    positions = np.concatenate([batch.positions for batch in taken])
    np.testing.assert_array_equal(positions, np.arange(12))
    images = np.concatenate([batch.images for batch in taken])
    assert images.shape == (12, SIZE, SIZE, 3) and images.dtype == np.float32
    for k in positions:
        image = decode.read_rgb(photos[k % 5].name)
        expected = normalize(crop(image, SIZE))
        np.testing.assert_array_equal(images[k], expected)
    assert all(batch.valid.all() and batch.errors == [] for batch in taken)


@pytest.mark.parametrize("num_threads", [0, 1, 3, 8])
def test_any_number_of_threads_gives_the_same_sequence(
    photos, monkeypatch, num_threads
):
    expected = take(stream(photos, SIZE, batch_size=2, num_threads=2), 5)
    read = decode.read_rgb

    def uneven(path, **options):  # early images come last
        time.sleep(0.02 if Path(path).name in ("0.png", "3.png") else 0.0)
        return read(path, **options)

    monkeypatch.setattr(decode, "read_rgb", uneven)
    got = take(stream(photos, SIZE, batch_size=2, num_threads=num_threads), 5)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.images, other.images)


@pytest.mark.parametrize("start", [1, 5, 7, 10**12 + 3])
def test_a_stream_started_at_k_continues_the_one_that_got_there(photos, start):
    (got,) = take(stream(photos, SIZE, start=start, batch_size=3), 1)
    np.testing.assert_array_equal(got.positions, start + np.arange(3))
    (walk,) = take(stream(photos, SIZE, start=start % 5, batch_size=3), 1)
    np.testing.assert_array_equal(got.images, walk.images)


def test_one_image_per_batch_equals_many(photos):
    singles = take(stream(photos, SIZE, start=3, batch_size=1), 4)
    (batch,) = take(stream(photos, SIZE, start=3, batch_size=4), 1)
    np.testing.assert_array_equal(
        np.concatenate([single.images for single in singles]), batch.images
    )


def test_broken_files_keep_their_place_and_are_named(photos):
    cut = Path(photos[1].name)
    cut.write_bytes(cut.read_bytes()[:300])
    os.remove(photos[3].name)
    (batch,) = take(stream(photos, SIZE, batch_size=5), 1)
    np.testing.assert_array_equal(batch.valid, [True, False, True, False, True])
    assert not batch.images[[1, 3]].any() and batch.images[[0, 2, 4]].all(0).any()
    assert len(batch.errors) == 2
    assert batch.errors[0].startswith(f"{cut}: ")
    assert batch.errors[1] == f"{photos[3].name}: No such file or directory"


def test_a_bug_in_reading_is_not_taken_for_a_broken_file(photos, monkeypatch):
    def buggy(image, size, *, patch_size):
        raise TypeError("a bug")

    monkeypatch.setitem(batches.RESIZES, "crop", buggy)
    with pytest.raises(TypeError, match="a bug"):
        take(stream(photos, SIZE), 1)


def test_closing_the_stream_ends_its_threads(photos):
    before = set(threading.enumerate())
    reading = stream(photos, SIZE, num_threads=3)
    next(reading)
    ours = set(threading.enumerate()) - before
    assert any(thread.name.startswith("grain-prefetch") for thread in ours)
    reading.close()
    for thread in ours:
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=10)
            assert not thread.is_alive(), f"{thread.name} still reads"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": -1}, "got start=-1"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"num_threads": -2}, "got num_threads=-2"),
        ({"size": 30}, "size: got 30 pixels"),
        ({"photographs": []}, "training list is empty"),
        ({"num_workers": -1}, "got num_workers=-1"),
        ({"part": (2, 2)}, r"got part=\(2, 2\), expected \(index, count\)"),
        ({"part": (-1, 2)}, r"got part=\(-1, 2\)"),
        ({"part": (0, 2), "batch_size": 3}, "got batch_size=3, .* the 2 parts"),
        ({"resize": "squeeze"}, "got resize=.squeeze., expected crop or keep"),
        ({"resize": "keep", "batch_size": 2}, "got 2 images per step, expected 1"),
    ],
)
def test_wrong_arguments_raise_at_the_call(photos, options, message):
    arguments = {"photographs": photos, "size": SIZE} | options
    with pytest.raises(ValueError, match=message):
        stream(**arguments)


# --- Hosts ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_parts_of_all_hosts_are_the_steps_of_one(photos, count):
    whole = take(stream(photos, SIZE, start=7, batch_size=6), 4)
    parts = [
        take(
            stream(photos, SIZE, start=7, batch_size=6, part=(index, count)),
            4,
        )
        for index in range(count)
    ]
    for step, expected in enumerate(whole):
        pieces = [part[step] for part in parts]
        assert all(len(piece.images) == 6 // count for piece in pieces)
        for field in ("positions", "images", "valid"):
            joined = np.concatenate([getattr(piece, field) for piece in pieces])
            np.testing.assert_array_equal(joined, getattr(expected, field))


def test_a_host_reads_its_part_only(photos, monkeypatch):
    read, decoded = [], decode.read_rgb
    monkeypatch.setattr(
        decode,
        "read_rgb",
        lambda path, **options: read.append(Path(path).stem) or decoded(path),
    )
    options = {"batch_size": 4, "part": (1, 2), "num_threads": 0}
    take(stream(photos, SIZE, **options), 2)
    assert read == ["2", "3", "1", "2"]  # images 2, 3, 6 and 7 of five photographs


# --- Sizes ----------------------------------------------------------------------------


def test_kept_photographs_come_in_few_shapes(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(30):
        width, height = (int(x) for x in rng.integers(30, 120, 2))
        save_noise(tmp_path / f"{i:02d}.png", width, height, seed=i)
    (tmp_path / "30.png").write_bytes(b"no image")
    photos = listing.open_photographs(str(tmp_path))
    taken = take(stream(photos, 56, resize="keep"), 31)
    shapes = {(batch.images.shape[2], batch.images.shape[1]) for batch in taken}
    assert shapes <= set(decode.buckets(56, 14)) and len(shapes) > 3
    for one, batch in zip(photos[:30], taken, strict=False):
        expected = normalize(decode.training_keep(one.read(), 56, patch_size=14))
        np.testing.assert_array_equal(batch.images, expected[None])
    assert taken[30].images.shape == (1, 56, 56, 3) and not taken[30].valid.any()


# --- Other places ---------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tfds_dataset_gives_the_batches_of_its_folder(
    num_workers, tmp_path, monkeypatch
):
    for i in range(7):
        save_noise(tmp_path / "in" / f"{i}.png", 30 + i, 40 - i, seed=i)
    (tmp_path / "in" / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    files = listing.list_images(tmp_path / "in")
    write_dataset(tmp_path / "sets", {"train": files})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    streams = [
        stream(
            batches.training_list(listing.open_photographs(spec), 7, shuffle_seed=5),
            SIZE,
            batch_size=3,
            num_workers=num_workers if spec.startswith("tfds") else 0,
        )
        for spec in (str(tmp_path / "in"), "tfds:tiny_photos")
    ]
    folder, dataset = (take(reading, 7) for reading in streams)
    for one, other in zip(folder, dataset, strict=True):
        for field in ("positions", "images", "valid"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert len(one.errors) == len(other.errors) == (~one.valid).sum()
    assert sum(len(batch.errors) for batch in dataset) == 3  # 21 images of seven


# --- Processes ------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_gives_the_same_sequence(photos, num_workers):
    Path(photos[1].name).write_bytes(b"no image")
    options = {"start": 4, "batch_size": 4, "part": (1, 2)}
    expected = take(stream(photos, SIZE, **options), 6)
    reading = stream(photos, SIZE, num_workers=num_workers, num_threads=1, **options)
    got = [next(reading) for _ in range(6)]
    assert len(multiprocessing.active_children()) == num_workers
    reading.close()
    assert not multiprocessing.active_children()
    for one, other in zip(got, expected, strict=True):
        for field in ("positions", "images", "valid"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert one.errors == other.errors


def test_a_worker_that_is_killed_is_told(photos):
    reading = stream(photos, SIZE, num_workers=1)
    next(reading)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    told = "a process that reads images was killed.*exit code -9"
    with pytest.raises(ChildProcessError, match=told):
        for _ in range(100):
            next(reading)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_still_starting_survives_sigterm(photos):
    def strike():
        while len(workers := multiprocessing.active_children()) < 2:
            time.sleep(0.001)
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)

    striker = threading.Thread(target=strike)
    striker.start()
    reading = stream(photos, SIZE, num_workers=2)
    for position in range(8):
        assert next(reading).positions == position
    striker.join()
    reading.close()


@pytest.fixture
def reader(photos, tmp_path):
    """A program that reads with two workers, and their process ids."""
    program = subprocess.Popen(
        [sys.executable, str(places.SUPPORT / "reader.py"), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield program, json.loads(program.stdout.readline())
    with contextlib.suppress(ProcessLookupError):  # also workers it left behind
        os.killpg(program.pid, signal.SIGKILL)
    program.communicate()


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and is not reaped yet does not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_parent_that_is_killed(reader):
    program, workers = reader
    assert len(workers) == 2 and all(map(is_running, workers))
    program.kill()
    until = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_and_sigterm_are_the_parents_to_answer(reader):
    program, workers = reader
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all of them
    output, errors = program.communicate(timeout=60)
    assert output == "closed []\n" and errors == "" and program.returncode == 0
    assert not any(map(is_running, workers))
