"""study/photos.py: files and folders in order, with names of their own."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.study import photos


def test_names_differ_in_more_than_case():
    files = [Path("x/a.jpg"), Path("x/A.png"), Path("y/a.webp"), Path("a-2.jpg")]
    assert photos.unique_names(files) == ["a", "A-2", "a-3", "a-2-2"]


def test_paths_are_collected_once_in_the_order_given(tmp_path):
    for name in ("b.png", "a.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 30)).save(tmp_path / name)
    found = photos.collect([str(tmp_path / "b.png"), str(tmp_path)])
    assert [path.name for path in found] == ["b.png", "a.png", "c.png"]
    with pytest.raises(FileNotFoundError, match="no such image or folder: nowhere"):
        photos.collect(["nowhere"])


def test_names_leave_room_for_those_of_figures():
    for name in ("x" * 251, "é" * 125, os.fsdecode(b"\xe9" * 251)):
        one, two = photos.unique_names([Path(f"a/{name}.jpg"), Path(f"b/{name}.jpg")])
        assert one == name[: len(one)] and two == f"{one}-2"
        assert 170 < len(os.fsencode(one)) <= 180


def test_photographs_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (112, 56)).save(tmp_path / "a.jpg", exif=exif)
    (one,) = photos.read_photos([tmp_path / "a.jpg"], 56, 14)
    assert one.pixels.shape == (112, 56, 3)


@pytest.mark.parametrize("size", [(3600, 504), (504, 3600)], ids=["wide", "tall"])
def test_a_panorama_that_is_cut_is_told_with_the_size_that_is_not(
    size, tmp_path, capsys
):
    path = tmp_path / "a.png"
    Image.new("RGB", size).save(path)
    (one,) = photos.read_photos([path], 518, 14)
    assert max(one.pixels.shape) == 1792
    assert capsys.readouterr().err == (
        f"{path}: cut, only 1792 of 3700 pixels are shown; a short side of 238 shows "
        "them all\n"
    )
    (one,) = photos.read_photos([path], 238, 14)
    assert max(one.pixels.shape) == 1694 and capsys.readouterr().err == ""  # of 1700


def test_photographs_are_whole_patches_and_unreadable_files_are_named(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 83, 3), np.uint8)
    for name in ("a.png", "c.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no image")
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")]
    one, two = photos.read_photos(files, 56, 14)
    assert (one.name, two.name) == ("a", "c") and one.digest == two.digest
    assert one.pixels.shape == (56, 70, 3) and one.pixels.dtype == np.uint8
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in told][0] == str(files[1])
    assert len(told) == 2 and "d.png" in told[1]
