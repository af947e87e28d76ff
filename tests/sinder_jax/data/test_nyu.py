import numpy as np
import pytest
from PIL import Image

import nyu_tree
from samples import error_of
from sinder_jax.data import nyu


@pytest.fixture
def folder(tmp_path):
    return nyu_tree.write(tmp_path / "nyu", train=2, test=1)


def test_lists_are_read_in_their_order(folder):
    splits = nyu.open_nyu(str(folder))
    assert len(splits.train) == 2 and len(splits.test) == 1
    assert splits.train[1].name == str(folder / "train_room_0001" / "rgb_00000.png")
    assert splits.lacks == "2 of 24231 in nyu_train.txt, 1 of 654 in nyu_test.txt"
    assert nyu.open_nyu(f"folder:{folder}") == splits


def test_depth_is_in_meters_and_zero_where_unknown(folder):
    view = nyu.open_nyu(str(folder)).test[0]
    image, meters = view.read()
    stored = np.asarray(Image.open(view.depth.name))
    assert image.size == (640, 480) and meters.dtype == np.float32
    np.testing.assert_allclose(meters, stored / 1000, rtol=1e-6)
    assert meters[0, 0] == 0 and 2 < meters[-1, -1] < 6


def test_a_missing_set_says_what_is_expected_where(tmp_path, folder):
    message = error_of(nyu.open_nyu, "/no/where", kind=FileNotFoundError)
    assert "/no/where" in message and "nyu_train.txt" in message
    assert "no data given" in error_of(nyu.open_nyu, "")
    for spec in ("tfds:nyu_depth_v2", "sample:crops"):
        message = error_of(nyu.open_nyu, spec)
        assert f"got the data {spec}, expected a folder with DATA/nyu_train" in message
    (folder / "nyu_test.txt").unlink()
    message = error_of(nyu.open_nyu, str(folder), kind=FileNotFoundError)
    assert f"no list {folder / 'nyu_test.txt'}" in message


def test_an_incomplete_set_names_a_file_and_how_many_are_missing(folder):
    gone = folder / "train_room_0001" / "sync_depth_00000.png"
    gone.unlink()
    message = error_of(nyu.open_nyu, str(folder), kind=FileNotFoundError)
    assert f"1 of 4 files of {folder / 'nyu_train.txt'} are missing" in message
    assert str(gone) in message


@pytest.mark.parametrize("content", ["a.png\n", "\n \n"], ids=["one column", "empty"])
def test_a_list_of_another_form_is_refused(folder, content):
    (folder / "nyu_train.txt").write_text(content)
    message = error_of(nyu.open_nyu, str(folder))
    assert "nyu_train.txt" in message and "sync_depth" in message
    assert "expected" in message


def test_depth_of_eight_bits_and_other_sizes_are_refused(folder):
    view = nyu.open_nyu(str(folder)).test[0]
    Image.fromarray(np.zeros((480, 640), np.uint8)).save(view.depth.name)
    assert "16-bit gray" in error_of(view.read)
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(view.depth.name)
    message = error_of(view.read)
    assert "64 x 48" in message and "640 x 480" in message
