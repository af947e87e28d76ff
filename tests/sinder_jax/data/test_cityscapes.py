import shutil

import numpy as np
from PIL import Image

import scene_trees
from samples import error_of
from sinder_jax.data import cityscapes, masks, scenes


def missing(root):
    return error_of(scenes.open_scenes, str(root), kind=FileNotFoundError)


def test_label_ids_become_27_classes(tmp_path):
    root = scene_trees.cityscapes(tmp_path / "cityscapes")
    found = scenes.open_scenes(f"folder:{root}")
    assert (len(found.train), len(found.val)) == (4, 2)
    assert found.title == "Cityscapes"
    assert found.lacks == (
        "Cityscapes has 2,975 training and 500 validation images, here are 4 and 2"
    )
    names = [scene.name.rpartition("leftImg8bit/")[2] for scene in found.train]
    assert names == [
        f"train/train{city}/train{city}_00000{i}_000019_leftImg8bit.png"
        for city, i in ((0, 0), (0, 2), (1, 1), (1, 3))
    ]
    pixels, mask = found.train[2].read()
    ids = scene_trees.labels(1, classes=34, shape=(24, 48)).astype(int)
    want = np.where((ids < 7) | (ids == 255), masks.IGNORE, ids - 7)
    assert np.array_equal(mask, want) and pixels.shape == (24, 48, 3)
    assert scenes.survey(found.val, 27).sizes == [(24, 48)] * 2


def test_names_and_colors_are_in_the_order_of_the_ids():
    assert len(cityscapes.CLASSES) == len(cityscapes.PALETTE) == 27
    named = dict(zip(cityscapes.CLASSES, cityscapes.PALETTE, strict=True))
    ids = {name: 7 + k for k, name in enumerate(cityscapes.CLASSES)}
    assert (ids["road"], ids["building"], ids["pole"]) == (7, 11, 17)
    assert (ids["sky"], ids["person"], ids["car"], ids["bicycle"]) == (23, 24, 26, 33)
    assert named["road"] == (128, 64, 128) and named["car"] == (0, 0, 142)
    assert named["sky"] == (70, 130, 180) and named["bicycle"] == (119, 11, 32)


def test_incomplete_trees_are_told(tmp_path):
    for gone, said in {
        "gtFine": "no folder ROOT/gtFine/train: expected ROOT/leftImg8bit/{train,val}/",
        "leftImg8bit": "no folder ROOT/leftImg8bit/train: expected ROOT/leftImg8bit/",
        "leftImg8bit/val": "no folder ROOT/leftImg8bit/val: expected",
        "gtFine/val/val0": "1 of 2 files have no mask, such as ROOT/leftImg8bit/val",
    }.items():
        root = scene_trees.cityscapes(tmp_path / gone.replace("/", "_"))
        shutil.rmtree(root / gone)
        message = missing(root)
        assert said.replace("ROOT", str(root)) in message
        assert "_gtFine_labelIds.png" in message and "\n" not in message


def test_other_labels_than_label_ids_are_told(tmp_path):
    root = scene_trees.cityscapes(tmp_path)
    for path in root.glob("gtFine/val/*/*_labelIds.png"):
        path.rename(str(path).replace("labelIds", "labelTrainIds"))
    said = f"no file *_gtFine_labelIds.png below {root}/gtFine/val"
    assert missing(root).startswith(said)


def test_an_id_beyond_the_classes_is_told(tmp_path):
    root = scene_trees.cityscapes(tmp_path)
    (path,) = root.glob("gtFine/val/val1/*_labelIds.png")
    Image.fromarray(np.full((24, 48), 34, np.uint8)).save(path)
    said = error_of(scenes.survey, scenes.open_scenes(str(root)).val, 27)
    assert said == (
        f"{path}: got the label 34, expected 7 to 33 for 27 classes, or 0 to 6 and 255 "
        "for pixels to ignore"
    )
