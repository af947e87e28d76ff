import json

import pytest

from loading import loaded
from samples import error_of
from sinder_jax.storage import run_files


def write_lines(workdir, *lines):
    (workdir / run_files.METRICS).write_bytes(b"".join(lines))


def line(image):
    return (json.dumps({"image": image, "loss": 0.5}) + "\n").encode()


@pytest.mark.parametrize(
    "end",
    [b'{"image": 2, "lo', b"\x00\x00\n", b'"text"\n', b"[1]\n", b"\xc3", b"{}\n"],
    ids=["cut", "zeros", "text", "list", "half a character", "no image"],
)
def test_metrics_end_at_the_first_line_that_is_not_complete(end, tmp_path):
    write_lines(tmp_path, line(0), line(1), end, line(2))
    assert [row["image"] for row in run_files.read_metrics(tmp_path)] == [0, 1]
    assert run_files.read_metrics_lines(tmp_path)[1] == line(1).decode()


def test_a_complete_row_without_its_line_end_is_not_a_line_yet(tmp_path):
    write_lines(tmp_path, line(0), line(1)[:-1])
    assert len(run_files.read_metrics(tmp_path)) == 1


def test_no_metrics_are_no_rows(tmp_path):
    assert run_files.read_metrics(tmp_path) == []


def test_a_json_file_is_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / run_files.CONFIG
    with pytest.raises(FileNotFoundError):
        run_files.read_json(path)
    path.write_text('{"lr": 0.005}')
    assert run_files.read_json(path) == {"lr": 0.005}
    for damaged in (b"{", b"[1]", b"\xff"):
        path.write_bytes(damaged)
        assert str(path) in error_of(run_files.read_json, path)


def test_numbered_directories_come_in_order_of_their_numbers(tmp_path):
    for name in ("00000120", "9", "00000030", "00000040.damaged", "x", "٣"):
        (tmp_path / name).mkdir()
    names = [path.name for path in run_files.numbered(tmp_path)]
    assert names == ["9", "00000030", "00000120"]
    assert run_files.numbered(tmp_path / "none") == []


@pytest.mark.parametrize("name", ["alive.json", "frozen", "states", "config.json"])
def test_any_file_of_a_run_makes_a_workdir(name, tmp_path):
    assert not run_files.is_workdir(tmp_path)
    (tmp_path / name).mkdir()
    assert run_files.is_workdir(tmp_path)


def test_reading_run_files_does_not_import_jax():
    _, names = loaded("sinder_jax.storage.run_files")
    assert "sinder_jax" in names and not {"jax", "flax", "orbax"} & names
