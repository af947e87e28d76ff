import os

import numpy as np
import pytest

from photos import save_noise, write_dataset
from samples import error_of
from sinder_jax.data import labelled, listing


def write_classes(root, train=("cat", "dog"), val=("cat", "dog"), count=2):
    for split, names in (("train", train), ("val", val)):
        for name in names:
            for i in range(count):
                save_noise(root / split / name / f"{i}.jpg", seed=i)
    return root


def relative(classes, root):
    return [os.path.relpath(each.name, root) for each in classes.photographs]


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_class_folders_are_numbered_by_name(tmp_path, prefix):
    write_classes(tmp_path, train=("b", "a", "B"), val=("b", "a", "B"))
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "train/notes.txt").write_text("not a class")
    train, val = labelled.open_classes(f"{prefix}{tmp_path}")
    assert train.names == val.names == ("B", "a", "b")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] == val.labels.tolist()
    assert train.labels.dtype == np.int32
    assert relative(train, tmp_path)[:3] == [
        "train/B/0.jpg",
        "train/B/1.jpg",
        "train/a/0.jpg",
    ]


def test_val_s_labels_mean_train_s_classes(tmp_path):
    write_classes(tmp_path, train=("a", "b", "c"), val=("b", "c"))
    train, val = labelled.open_classes(str(tmp_path))
    assert val.labels.tolist() == [1, 1, 2, 2] and val.names == train.names
    assert (train.absent(), val.absent()) == (0, 1)


def test_images_in_sub_folders_of_a_class_count(tmp_path):
    save_noise(write_classes(tmp_path) / "train/cat/more/3.JPEG")
    train, _ = labelled.open_classes(str(tmp_path))
    assert train.labels.tolist() == [0, 0, 0, 1, 1]


def test_an_empty_class_raises_with_its_folder(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "val/cow").mkdir()
    message = error_of(labelled.open_classes, str(tmp_path))
    assert message.startswith(f"the class {tmp_path}/val/cow has no image: expected")


def test_a_class_beyond_train_s_raises(tmp_path):
    write_classes(tmp_path, val=("cat", "cow"))
    message = error_of(labelled.open_classes, str(tmp_path))
    assert "got the class cow in val but not in train" in message


def test_a_missing_folder_raises_with_what_is_expected(tmp_path):
    expected = f"{tmp_path}/train/CLASS/*.jpg and {tmp_path}/val/CLASS/*.jpg"
    for folder in ("train", "val"):
        message = error_of(labelled.open_classes, str(tmp_path), kind=FileNotFoundError)
        assert message == f"no folder {tmp_path / folder}: expected {expected}"
        save_noise(tmp_path / folder / "cat/0.jpg")


def test_images_outside_classes_raise(tmp_path):
    save_noise(tmp_path / "train/0.jpg")
    message = error_of(labelled.open_classes, str(tmp_path))
    assert message.startswith(f"no class in {tmp_path}/train: expected")
    write_classes(tmp_path)
    message = error_of(labelled.open_classes, str(tmp_path))
    assert message.startswith(f"{tmp_path}/train has images that are in no class")


def test_one_class_raises(tmp_path):
    write_classes(tmp_path, train=("cat",), val=("cat",))
    message = error_of(labelled.open_classes, str(tmp_path))
    assert message.startswith(f"{tmp_path}: got 1 class, cat, expected at least 2")


def test_data_of_a_segmentation_raises(tmp_path):
    write_classes(tmp_path, train=("images", "masks"), val=("images", "masks"))
    assert "a segmentation" in error_of(labelled.open_classes, str(tmp_path))


@pytest.mark.parametrize(
    "spec", ["", "sample", "list:photos.txt", "sample:mosaics", "tfds:", "folder:"]
)
def test_data_without_classes_raise(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match="train/CLASS"):
        labelled.open_classes(spec)


def test_crops_are_labeled_by_their_photograph():
    train, val = labelled.open_classes(listing.CROPS)
    assert len(train.names) == 8 and "astronaut" in train.names
    for split in (train, val):
        assert np.bincount(split.labels).tolist() == [len(split.labels) // 8] * 8
        for crop, label in zip(split.photographs, split.labels, strict=True):
            assert train.names[label] in crop.file.name
    numbers = [{each.number for each in split.photographs} for split in (train, val)]
    assert not numbers[0] & numbers[1]  # a number is a draw
    repaired_on = {each.number for each in listing.open_photographs(listing.CROPS)}
    assert not numbers[1] & repaired_on


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_tfds_splits_have_the_labels_of_their_records(tmp_path, monkeypatch, held_out):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        save_noise(file, seed=i)
    write_dataset(tmp_path / "sets", {"train": files[:3], held_out: files[3:]})
    train, val = labelled.open_classes("tfds:tiny_photos")
    assert train.names == val.names == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 0] and val.labels.tolist() == [0, 1]
    assert f"/{held_out}#1" in val.photographs[1].name


def test_a_tfds_set_without_validation_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    save_noise(tmp_path / "0.png")
    write_dataset(tmp_path / "sets", {"train": [tmp_path / "0.png"]})
    message = error_of(labelled.open_classes, "tfds:tiny_photos")
    assert "has no split validation, only train" in message
