import shutil

import numpy as np
import pytest
from PIL import Image

import bucket as buckets
import scene_trees
from samples import error_of
from sinder_jax.data import decode, masks, scenes
from sinder_jax.data.scene_files import Scene


def missing(*args, **kwargs):
    return error_of(scenes.open_scenes, *args, kind=FileNotFoundError, **kwargs)


def test_own_folders(tmp_path):
    root = scene_trees.own(tmp_path / "mine")
    found = scenes.open_scenes(str(root))
    assert (len(found.train), len(found.val), found.classes) == (4, 2, ())
    pixels, mask = found.val[1].read()
    assert np.array_equal(mask, scene_trees.labels(1))
    assert pixels.shape == (24, 36, 3)
    assert found.val[1].name == str(root / "val/images/1.jpg")
    (root / "classes.txt").write_text("sky\nsea\nland\n")
    named = scenes.open_scenes(f"folder:{root}")
    assert named.classes == ("sky", "sea", "land")


def test_own_folders_may_have_folders_and_other_suffixes(tmp_path):
    for split in ("train", "val"):
        root = tmp_path / split
        scene_trees.save(
            root / "images/a/1.PNG", root / "masks/a/1.tif", scene_trees.labels(0)
        )
    assert len(scenes.open_scenes(str(tmp_path)).val) == 1


def test_ade20k_numbers_begin_with_1(tmp_path):
    root = scene_trees.ade(tmp_path / "ADEChallengeData2016")
    for spec in (root, tmp_path):
        found = scenes.open_scenes(str(spec))
        assert (len(found.train), len(found.val)) == (4, 2)
    assert len(found.classes) == 150
    assert "20,210 training and 2,000 validation images" in found.lacks
    _, mask = found.train[0].read()
    assert np.array_equal(mask, masks.counted_from(scene_trees.labels(0, 151), 1))


def test_names_of_ade20k_are_read(tmp_path):
    root = scene_trees.ade(tmp_path)
    rows = [f"{k}\t0.1\t5\t5\tname{k}, other" for k in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio", *rows]))
    assert scenes.open_scenes(str(root)).classes[149] == "name150"


def test_voc_lists(tmp_path):
    root = scene_trees.voc(tmp_path / "VOCdevkit/VOC2012")
    for spec in (tmp_path, tmp_path / "VOCdevkit", root):
        found = scenes.open_scenes(str(spec))
        assert (len(found.train), len(found.val)) == (4, 2)
        assert found.classes[0] == "background" and len(found.classes) == 21
    assert found.title == "VOC2012, list train" and "1,464" in found.lacks
    colors = dict(zip(found.classes, found.palette, strict=True))
    assert colors["background"] == (0, 0, 0) and colors["aeroplane"] == (128, 0, 0)
    assert colors["person"] == (192, 128, 128)
    assert colors["tvmonitor"] == (0, 64, 128)
    assert np.array_equal(found.val[0].read()[1], scene_trees.labels(100, 21))
    aug = root / "SegmentationClassAug"
    scene_trees.save(root / "JPEGImages/x.jpg", aug / "x.png", scene_trees.labels(7))
    lists = root / "ImageSets/Segmentation"
    (lists / "trainaug.txt").write_text((lists / "train.txt").read_text() + "x\n")
    augmented = scenes.open_scenes(str(root), train_list="trainaug")
    assert augmented.train[-1].mask.name == str(aug / "x.png")
    assert augmented.title == "VOC2012, list trainaug"
    message = missing(str(root), train_list="trainval")
    assert "train.txt, trainaug.txt, val.txt" in message


def test_a_list_of_other_data_than_voc_is_refused():
    with pytest.raises(ValueError, match="got 'trainaug' for sample:mosaics"):
        scenes.open_scenes("sample:mosaics", train_list="trainaug")


def test_mosaics_are_found_by_name():
    found = scenes.open_scenes("sample:mosaics")
    assert len(found.classes) == 8 and found.train[0].name == "sample:mosaics/train#0"
    names = [scene.name for scene in (*found.train, *found.val)]
    assert len(set(names)) == len(names)
    assert scenes.survey(found.val[:2], 8) == ([7, 7], [(240, 320)] * 2)


def test_streets_are_found_by_name():
    found = scenes.open_scenes("sample:streets")
    assert (len(found.train), len(found.val)) == (96, 24)
    assert found.val[0].name == "sample:streets/val#1000"
    names = {scene.name for scene in (*found.train, *found.val)}
    assert len(names) == 120 and len(found.classes) == len(found.palette) == 8
    assert scenes.survey(found.val[:2], 8) == ([7, 7], [(256, 512)] * 2)


TREES = ("own", "ade", "voc", "cityscapes", "potsdam")


@pytest.mark.parametrize("tree", TREES)
def test_a_bucket_gives_the_scenes_of_a_folder(tree, tmp_path, monkeypatch):
    bucket = buckets.install(monkeypatch, tmp_path / "cloud")
    root = getattr(scene_trees, tree)(tmp_path / "data")
    for file in root.rglob("*.*"):
        name = f"gs://scenes/{file.relative_to(tmp_path).as_posix()}"
        bucket.put_object(name, file.read_bytes())
    there = scenes.open_scenes("folder:gs://scenes/data")
    here = scenes.open_scenes(str(root))
    assert (there.title, there.lacks) == (here.title, here.lacks)
    for one, other in zip(
        (*there.train, *there.val), (*here.train, *here.val), strict=True
    ):
        assert one.name.removeprefix("gs://scenes") == other.name.removeprefix(
            str(tmp_path)
        )
        assert all(map(np.array_equal, one.read(), other.read()))
        assert np.array_equal(one.read_mask(), other.read_mask())
        assert one.check(0) == other.check(0)


# --- Mistakes -------------------------------------------------------------------------


def test_an_incomplete_tree_is_told(tmp_path):
    assert "config.data takes a folder" in error_of(scenes.open_scenes, "")
    assert "no folder" in missing(str(tmp_path / "nowhere"))
    assert "voc holds boxes" in error_of(scenes.open_scenes, "tfds:voc/2012")
    (tmp_path / "empty").mkdir()
    said = missing(str(tmp_path / "empty"))
    for kind in ("DATA/{train,val}/masks", "VOC", "Cityscapes", "IIC", *scenes.SAMPLES):
        assert kind in said
    root = scene_trees.own(tmp_path / "mine")
    shutil.rmtree(root / "val/masks")
    assert f"no folder {root}/val/masks: expected {root}/" in missing(str(root))
    root = scene_trees.ade(tmp_path / "ade")
    shutil.rmtree(root / "images/validation")
    assert "no folder" in missing(str(root)) and "ADEChallengeData2016" in missing(
        str(root)
    )
    root = scene_trees.voc(tmp_path / "voc")
    (root / "SegmentationClass/2007_000002.png").unlink()
    (root / "JPEGImages/2007_000001.jpg").unlink()
    said = missing(str(root))
    assert said.startswith("2 files that") and "JPEGImages/2007_000001.jpg" in said


def test_an_image_without_mask_and_a_mask_without_image_are_told(tmp_path):
    root = scene_trees.own(tmp_path)
    (root / "train/masks/2.png").unlink()
    assert "1 of 4 files have no mask, such as" in missing(str(root))
    (root / "train/images/2.jpg").unlink()
    scene_trees.save(
        tmp_path / "x/9.jpg", root / "train/masks/9.png", scene_trees.labels(0)
    )
    assert "1 of 4 files have no image" in missing(str(root))
    shutil.copy(root / "train/images/1.jpg", root / "train/images/1.jpeg")
    assert "same name but for the suffix" in error_of(scenes.open_scenes, str(root))


def test_names_of_classes_that_cannot_be_used_are_told(tmp_path):
    root = scene_trees.own(tmp_path)
    for content, said in {
        b"sky\n\nsea\n": "line 2 is empty, expected the name of class 1",
        b"sky\nsea\nsky\n": "got 'sky' on line 1 and on line 3",
        "Stra\u00dfe\n".encode("latin-1"): "not text in UTF-8",
        b"\n": "no class is named",
    }.items():
        (root / "classes.txt").write_bytes(content)
        found = error_of(scenes.open_scenes, str(root))
        assert found.startswith(f"{root}/classes.txt: ") and said in found
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nsea\r\n\r\n")
    assert scenes.open_scenes(str(root)).classes == ("sky", "sea")


def test_the_survey_finds_labels_beyond_the_classes(tmp_path):
    root = scene_trees.own(tmp_path, classes=5)
    found = scenes.open_scenes(str(root))
    counted = []
    survey = scenes.survey([*found.train, *found.val], seen=counted.append)
    assert max(survey.largest) == 4 and survey.sizes == [(24, 36)] * 6
    assert counted == [1, 2, 3, 4, 5, 6]
    said = error_of(scenes.survey, found.train, 4)
    assert "masks/" in said and "got the label 4, expected 0 to 3 for 4 classes" in said
    nothing = np.full((24, 36), 255, np.uint8)
    Image.fromarray(nothing).save(root / "val/masks/0.png")
    assert scenes.survey(found.val[:1]).largest == [-1]


def test_the_survey_counts_ade20k_from_1(tmp_path):
    root = scene_trees.ade(tmp_path)
    Image.fromarray(np.full((24, 36), 151, np.uint8)).save(
        root / "annotations/validation/ADE_00000001.png"
    )
    said = error_of(scenes.survey, scenes.open_scenes(str(root)).val, 150)
    assert "got the label 151, expected 1 to 150 for 150 classes" in said


@pytest.mark.parametrize("read", [Scene.read, lambda scene: scene.check(0)])
def test_a_mask_of_another_size_is_told(tmp_path, read):
    root = scene_trees.own(tmp_path)
    scene_trees.save(
        root / "val/images/0.jpg",
        root / "val/masks/0.png",
        scene_trees.labels(0),
        size=(30, 24),
    )
    scene = scenes.open_scenes(str(root)).val[0]
    said = error_of(read, scene, kind=decode.UnreadableImage)
    assert "a mask of 36 x 24 pixels for an image of 30 x 24" in said
