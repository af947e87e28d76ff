import numpy as np

from sinder_jax.data import mosaics
from sinder_jax.data.masks import IGNORE
from sinder_jax.data.mosaics import Mosaic


def test_a_mosaic_is_drawn_from_its_number_alone():
    first, other = Mosaic("train", 3).read(), Mosaic("train", 4).read()
    again = Mosaic("train", 3).read()
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1], other[1])


def test_masks_hold_classes_and_a_border():
    _, mask = Mosaic("val", 1_000).read()
    labels, counts = np.unique(mask, return_counts=True)
    assert labels[-1] == IGNORE and labels[:-1].max() < len(mosaics.classes())
    assert 0.005 < counts[-1] / mask.size < 0.1


def test_every_class_is_in_both_splits():
    for split in mosaics.NUMBERS:
        seen = {
            label
            for m in mosaics.scenes(split)[:12]
            for label in np.unique(m.read()[1])
        }
        assert seen == {*range(len(mosaics.classes())), IGNORE}


def test_training_and_validation_share_no_texture(monkeypatch):
    """Quarters of a photograph whose pixels are numbered meet in no split."""
    numbered = np.arange(512 * 700, dtype=np.int32).reshape(512, 700)

    class Photograph:
        size, width, height = (700, 512), 700, 512

        def resize(self, size, how):
            assert size == self.size
            return numbered

    monkeypatch.setattr(mosaics.decode, "read_rgb", lambda path: Photograph())
    mosaics._quarters.cache_clear()
    train, val = ([*mosaics._quarters(0, split)] for split in ("train", "val"))
    mosaics._quarters.cache_clear()
    pixels = [part.ravel() for part in (*train, *val)]
    assert np.array_equal(np.sort(np.concatenate(pixels)), numbered.ravel())
    assert mosaics.NUMBERS["train"].stop <= mosaics.NUMBERS["val"].start
