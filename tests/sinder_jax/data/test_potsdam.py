import numpy as np
import pytest
from scipy.io import savemat

import scene_trees
from samples import error_of
from sinder_jax.data import decode, potsdam, scenes


def said_of(root):
    found = scenes.open_scenes(str(root)).train[0]
    said = error_of(found.read, kind=decode.UnreadableImage)
    assert "\n" not in said
    assert error_of(scenes.survey, [found], 3) == said
    return said


def test_six_labels_become_three_classes(tmp_path):
    root = scene_trees.potsdam(tmp_path)
    found = scenes.open_scenes(str(root))
    assert (len(found.train), len(found.val)) == (4, 2)
    assert found.title == "Potsdam-3" and len(found.classes) == 3
    assert "4,545 training and 855 validation images, here are 4 and 2" in found.lacks
    order = [scene.name for scene in (*found.train, *found.val)]
    assert order == [f"{root}/imgs/{7 * i % 31}.mat" for i in range(6)]
    pixels, mask = found.val[1].read()
    fine = scene_trees.labels(5, classes=6, shape=(24, 24))
    want = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2, 255: 255}
    assert mask.tolist() == [[want[k] for k in row] for row in fine.tolist()]
    assert mask.dtype == np.uint8
    assert np.array_equal(pixels[..., 0], (fine % 8 * 30).astype(np.uint8))
    assert pixels.shape == (24, 24, 3)
    labels, sizes = scenes.survey(found.train, 3)
    assert max(labels) == 2 and sizes == [(24, 24)] * 4


def test_a_tile_changes_with_either_file(tmp_path):
    root = scene_trees.potsdam(tmp_path)
    tile = scenes.open_scenes(str(root)).train[0]
    first = tile.stamp()
    savemat(root / "gt/0.mat", {"gt": np.zeros((24, 25), np.int32)})
    assert tile.stamp()[0] == first[0] and tile.stamp()[1] != first[1]
    assert "got labels of 25 x 24 pixels for an image of 24 x 24" in said_of(root)


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_other_integers_and_no_infrared_are_taken(tmp_path, kind):
    root = scene_trees.potsdam(tmp_path)
    labels = np.array([[0, 1, 2], [3, 4, 5]], kind)
    savemat(root / "gt/0.mat", {"gt": labels}, do_compression=True)
    savemat(root / "imgs/0.mat", {"img": np.ones((2, 3, 3), np.uint8)})
    _, mask = scenes.open_scenes(str(root)).train[0].read()
    assert mask.tolist() == [[0, 1, 2], [2, 0, 1]]


# --- Mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"image": np.ones(3)}, 'got the variables image, expected an array "img"'),
        ({}, 'got the variables none, expected an array "img"'),
        ({"img": np.zeros((0, 0))}, 'expected an array "img"'),
        ({"img": np.ones((4, 4, 4))}, 'got "img" of float64 (4, 4, 4), expected uint8'),
        (
            {"img": np.ones((4, 4), np.uint8)},
            'got "img" of uint8 (4, 4), expected uint8',
        ),
        ({"img": np.ones((4, 4, 6), np.uint8)}, "uint8 (4, 4, 6)"),
        ({"img": {"a": 1}}, 'got the variables img, expected an array "img"'),
    ],
)
def test_other_images_are_refused(tmp_path, variables, said):
    root = scene_trees.potsdam(tmp_path)
    savemat(root / "imgs/0.mat", variables)
    message = said_of(root)
    assert message.startswith(f"{root}/imgs/0.mat: ") and said in message


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.ones((24, 24)), 'got "gt" of float64 (24, 24), expected int32'),
        (np.ones((24, 24, 3), np.int32), 'got "gt" of int32 (24, 24, 3)'),
        (np.full((24, 24), 6), "got the label 6, expected 0 to 5, or 255"),
        (np.full((24, 24), -1), "got the label -1, expected 0 to 5, or 255"),
    ],
)
def test_other_labels_are_refused(tmp_path, labels, said):
    root = scene_trees.potsdam(tmp_path)
    savemat(root / "gt/0.mat", {"gt": labels})
    message = said_of(root)
    assert message.startswith(f"{root}/gt/0.mat: ") and said in message


def test_damaged_and_missing_files_are_told(tmp_path):
    root = scene_trees.potsdam(tmp_path)
    path = root / "imgs/0.mat"
    path.write_bytes(path.read_bytes()[:1000])
    assert said_of(root) == f"{path}: damaged: it ends too early"
    path.write_bytes(b"no MATLAB file" * 100)
    assert said_of(root) == f"{path}: not a MATLAB file of version 5 to 7"
    tile = scenes.open_scenes(str(root)).train[0]
    path.unlink()
    said = error_of(tile.read, kind=decode.UnreadableImage)
    assert said == f"{path}: No such file or directory"


def test_version_7_3_is_told(tmp_path):
    root = scene_trees.potsdam(tmp_path)
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    (root / "gt/0.mat").write_bytes(head.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n" * 40)
    assert said_of(root) == (
        f"{root}/gt/0.mat: a MATLAB file of version 7.3; save it as version 7, by "
        "MATLAB's -v7 or scipy.io.savemat"
    )


def test_incomplete_trees_are_told(tmp_path):
    root = scene_trees.potsdam(tmp_path)

    def missing():
        return error_of(scenes.open_scenes, str(root), kind=FileNotFoundError)

    (root / "gt/7.mat").unlink()
    (root / "imgs/0.mat").unlink()
    listed = root / "labelled_train.txt"
    said = f"2 files that {listed} asks for are missing, such as {root}/imgs/0.mat"
    assert missing() == said
    listed.write_text("\n")
    said = error_of(scenes.open_scenes, str(root))
    assert said == f"{listed} names no tile"
    for name in potsdam.LISTS.values():
        (root / name).unlink()
    said = f"no list {listed}: expected {root}/labelled_train.txt, {root}/labelled_test"
    assert missing().startswith(said)
