import pytest

from loading import loaded
from rows import STRANGE, line
from samples import error_of
from sinder_jax.storage import run_files


def write_lines(workdir, *lines):
    (workdir / run_files.METRICS).write_bytes(b"".join(lines))


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_a_strange_line_is_left_out_and_the_good_ones_after_it_are_not(
    strange, tmp_path
):
    write_lines(tmp_path, line(0), line(1), strange, line(3))
    assert [row["image"] for row in run_files.read_metrics(tmp_path)] == [0, 1, 3]
    found = run_files.read_metrics_lines(tmp_path)
    assert found[3] == line(3).decode()
    told = "metrics.jsonl lacks 1 of 4 images: 2"
    assert run_files.lacking(found, 4) == told


def test_lines_that_are_doubled_or_out_of_order_come_once_and_in_order(tmp_path):
    write_lines(tmp_path, line(1), line(0), line(1), line(2), line(0, loss=9.0))
    found = run_files.read_metrics_lines(tmp_path)
    assert "".join(found.values()).encode() == line(0) + line(1) + line(2)


def test_an_image_may_have_no_defect_or_be_unreadable(tmp_path):
    bad = dict.fromkeys(("layer", "loss", "alpha", "num_outliers", "finite"))
    write_lines(tmp_path, line(0, layer=-1, loss=None), line(1, readable=False, **bad))
    assert len(run_files.read_metrics(tmp_path)) == 2


def test_ranges_of_lacking_images_are_named_and_only_some_of_them():
    assert run_files.lacking([0, 1, 2], 3) == run_files.lacking([], 0) == ""
    told = run_files.lacking([0, 1, 2, 3, 5, 6, 9, 10, 11], 12)
    assert told == "metrics.jsonl lacks 3 of 12 images: 4, 7-8"
    told = run_files.lacking(range(0, 100, 2), 100)
    assert told.endswith(
        "lacks 50 of 100 images: 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ..."
    )


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


@pytest.mark.parametrize(
    ("text", "held", "claimed"),
    [
        ("", "", "a repair"),  # no file
        ('{"mask_thr": 4.0}', "a repair", "a repair"),
        ('{"protocol": "knn"}', *["an evaluation (knn)"] * 2),
        ('{"protocol": "knn", "mask_thr": 4.0}', *["an evaluation (knn)"] * 2),
        ('{"hidden_size": 384}', *["a config.json of something else"] * 2),
        ("[1]", "a config.json of something else", "a repair"),
        ("{", "a config.json of something else", "a repair"),
    ],
)
def test_a_folder_holds_what_its_config_says(text, held, claimed, tmp_path):
    if text:
        (tmp_path / run_files.CONFIG).write_text(text)
    assert run_files.holds(tmp_path) == held
    (tmp_path / run_files.CLAIMS).mkdir()
    assert run_files.holds(tmp_path) == claimed


def test_numbered_directories_come_in_order_of_their_numbers(tmp_path):
    for name in ("00000120", "9", "00000030", "00000040.damaged", "x", "٣"):
        (tmp_path / name).mkdir()
    names = [path.name for path in run_files.numbered(tmp_path)]
    assert names == ["9", "00000030", "00000120"]
    assert run_files.numbered(tmp_path / "none") == []


@pytest.mark.parametrize(
    "name", ["alive.json", "claims", "frozen", "states", "config.json"]
)
def test_any_file_of_a_run_makes_a_workdir(name, tmp_path):
    assert not run_files.is_workdir(tmp_path)
    (tmp_path / name).mkdir()
    assert run_files.is_workdir(tmp_path)


def test_reading_run_files_does_not_import_jax():
    _, names = loaded("sinder_jax.storage.run_files")
    assert "sinder_jax" in names and not {"jax", "flax", "orbax"} & names
