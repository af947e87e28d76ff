import json
import os

import numpy as np
import pytest

from samples import error_of
from sinder_jax.storage import feature_store
from sinder_jax.storage.feature_store import CHUNKS, HEADER, ROWS

KEY = {"model": "a", "photographs": "b"}
VALUES = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)


def opened(folder, key=KEY, **changed):
    given = {"count": 10, "shape": (3,), "chunk": 4} | changed
    return feature_store.open_rows(folder, key, **given)


def write_missing(store, values=VALUES, most=9):
    for rows in store.missing():
        for start in range(rows.start, rows.stop, store.chunk)[:most]:
            store.write(start, values[start : start + store.chunk])


def written(folder, **changed):
    with opened(folder, **changed) as store:
        write_missing(store)
        return store.array()


def test_rows_come_back_bit_for_bit(tmp_path):
    folder = feature_store.folder_of(tmp_path, KEY)
    found = written(folder)
    np.testing.assert_array_equal(found, VALUES)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    with opened(folder) as store:
        assert not store.missing() and store.damaged == 0
        np.testing.assert_array_equal(store.array(), VALUES)


def test_what_was_written_before_a_kill_is_found_again(tmp_path):
    with opened(tmp_path) as store:
        assert store.missing() == [range(0, 10)]
        store.write(4, VALUES[4:8])
    with open(tmp_path / CHUNKS, "ab") as lines:
        lines.write(b'{"chunk": 0, "sha2')  # cut short
    with opened(tmp_path) as store:
        assert store.missing() == [range(0, 4), range(8, 10)]
        write_missing(store)
    with opened(tmp_path) as store:
        assert not store.missing()
        np.testing.assert_array_equal(store.array(), VALUES)


@pytest.mark.parametrize("byte", [0, 47, 50, 119])
def test_a_flipped_bit_makes_its_chunk_missing(tmp_path, byte):
    written(tmp_path)
    content = bytearray((tmp_path / ROWS).read_bytes())
    content[byte] ^= 1
    (tmp_path / ROWS).write_bytes(content)
    with opened(tmp_path) as store:
        chunk = byte // 48 * 4
        assert store.missing() == [range(chunk, min(chunk + 4, 10))]
        assert store.damaged == 1
        write_missing(store)
        np.testing.assert_array_equal(store.array(), VALUES)


def test_lines_without_bytes_are_missing_chunks(tmp_path):
    """What a power loss may leave, for nothing is flushed to the disk."""
    written(tmp_path)
    os.truncate(tmp_path / ROWS, 50)
    with opened(tmp_path) as store:
        assert store.missing() == [range(4, 10)]


@pytest.mark.parametrize("spot", [0, 5, 30, -3])
def test_a_damaged_header_starts_anew(tmp_path, spot):
    written(tmp_path)
    content = bytearray((tmp_path / HEADER).read_bytes())
    content[spot] ^= 0x81
    (tmp_path / HEADER).write_bytes(content)
    with opened(tmp_path) as store:
        assert store.missing() == [range(0, 10)] and not store.damaged


@pytest.mark.parametrize(
    "line",
    [
        b"[]\n",
        b'{"chunk": 99, "sha256": "", "rounding": 0}\n',
        b'{"chunk": 0, "sha256": "", "rounding": "x"}\n',
        b"\xff\n",
    ],
)
def test_lines_of_no_chunk_are_passed_over(tmp_path, line):
    written(tmp_path)
    with open(tmp_path / CHUNKS, "ab") as lines:
        lines.write(line)
    with opened(tmp_path) as store:
        assert not store.missing()


@pytest.mark.parametrize(
    "changed, wrong",
    [
        ({"key": KEY | {"model": "c"}}, "another model"),
        ({"key": {"model": "c", "photographs": "d"}}, "another model and photographs"),
        ({"count": 11}, "another count"),
        ({"shape": (2, 3)}, "another shape"),
        ({"dtype": "float16"}, "another dtype"),
    ],
)
def test_a_folder_of_other_features_is_refused(tmp_path, changed, wrong):
    """Such as one that was renamed; its own name is a digest of the key."""
    written(tmp_path)
    message = error_of(opened(tmp_path, **changed).__enter__)
    assert f"{tmp_path} holds the features of {wrong}: remove it" in message


def test_its_own_size_of_a_chunk_counts(tmp_path):
    written(tmp_path)
    with opened(tmp_path, chunk=5) as store:
        assert store.chunk == 4 and not store.missing()


def test_a_second_writer_is_refused(tmp_path):
    with opened(tmp_path):
        message = error_of(opened(tmp_path).__enter__)
    assert "another process is writing" in message


def test_float16_says_what_it_costs(tmp_path):
    with opened(tmp_path, dtype="float16") as store:
        write_missing(store)
        found = store.array()
        assert found.dtype == np.float16
        moved = np.linalg.norm(found - VALUES, axis=1) / np.linalg.norm(VALUES, axis=1)
        assert store.rounding() == pytest.approx(moved.max(), rel=1e-3)
        assert 0 < store.rounding() < 2**-11
    assert written(tmp_path / "whole").dtype == np.float32


def test_what_is_too_large_for_float16_is_refused(tmp_path):
    with opened(tmp_path, dtype="float16") as store:
        message = error_of(store.write, 0, VALUES[:4] * np.float32(1e5))
    assert "too large for float16: keep features as float32" in message


def test_an_unknown_number_format_is_refused(tmp_path):
    message = error_of(opened(tmp_path, dtype="int8").__enter__)
    assert message == "got dtype 'int8', expected float32 or float16"


def test_another_key_has_another_folder(tmp_path):
    names = {
        feature_store.folder_of(tmp_path, key)
        for key in (KEY, KEY | {"model": "c"}, dict(reversed(KEY.items())))
    }
    assert len(names) == 2


def test_the_header_tells_people_what_the_rows_are(tmp_path):
    written(tmp_path)
    told = json.loads((tmp_path / HEADER).read_text().splitlines()[0])
    assert told["key"] == KEY and told["count"] == 10
