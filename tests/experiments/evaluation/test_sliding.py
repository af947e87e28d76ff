"""Windows, sizes and mirror images, beside a loop over whole arrays in PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.evaluation import sliding
from experiments.evaluation.schedule import Schedule
from sinder_jax import families
from sinder_jax.data import decode, mosaics, opencv
from sinder_jax.evals import segmentation

PATCH, CLASSES = 14, 5
STATISTICS = families.named("dinov2").statistics
SCHEDULE = Schedule(
    crop=40,
    stride=26,
    whole=False,
    train_ratios=(0.5, 2.0),
    ratios=(1.0, 1.7),
    flips=(False, True),
    images_per_step=1,
    options=segmentation.SegmentationOptions(),
)
MIX = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)


class Noise:
    """A scene without files."""

    def __init__(self, height, width, seed=0):
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        self.pixels = np.repeat(np.repeat(small, 8, 0), 8, 1)[:height, :width].copy()

    def read(self):
        return self.pixels, np.zeros(self.pixels.shape[:2], np.uint8)


def patch_means(windows):
    n, height, width, _ = windows.shape
    cells = windows.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return 4 * cells.mean((2, 4)) @ MIX


def predict(scene, logits=patch_means, batch=3, **changes):
    model = sliding.Model(
        lambda windows: jnp.asarray(logits(windows)), STATISTICS, PATCH, batch
    )
    found = list(
        sliding.predict(
            model,
            [scene, scene],
            SCHEDULE._replace(**changes),
            num_threads=0,
            num_workers=0,
        )
    )
    assert np.array_equal(found[0].classes, found[1].classes)
    return found[0].classes


def reference(scene, schedule):
    """mmsegmentation's way, with arrays as large as the resized image."""
    torch = pytest.importorskip("torch")
    height, width = scene.pixels.shape[:2]
    total = torch.zeros(CLASSES, height, width)
    for ratio in schedule.ratios:
        scale = int(schedule.crop * ratio) / min(height, width)
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        for flip in schedule.flips:
            image = decode.normalize(opencv.resize(scene.pixels, size), STATISTICS)
            scores = whole_or_slid(image[:, ::-1] if flip else image, schedule)
            scores = torch.nn.functional.interpolate(
                scores[None], (height, width), mode="bilinear"
            )[0].softmax(0)
            total += scores.flip(-1) if flip else scores
    return total.argmax(0).numpy()


def whole_or_slid(image, schedule):
    torch = pytest.importorskip("torch")
    height, width, _ = image.shape
    spans = [[(0, height)], [(0, width)]]
    if not schedule.whole:
        spans = [
            segmentation.windows(n, schedule.crop, schedule.stride)
            for n in (height, width)
        ]
    scores, cover = torch.zeros(CLASSES, height, width), torch.zeros(height, width)
    for y in spans[0]:
        for x in spans[1]:
            window = image[y[0] : y[1], x[0] : x[1]]
            sides = [segmentation.center_padding(n, PATCH) for n in window.shape[:2]]
            found = patch_means(np.pad(window, [*sides, (0, 0)])[None])
            here = torch.nn.functional.interpolate(
                torch.tensor(found).permute(0, 3, 1, 2),
                window.shape[:2],
                mode="bilinear",
            )[0]
            scores[:, y[0] : y[1], x[0] : x[1]] += here
            cover[y[0] : y[1], x[0] : x[1]] += 1
    return scores / cover


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flips": (False,), "ratios": (1.0,)},
        {"whole": True},
        {"ratios": (0.6, 1.0)},  # smaller than a window
    ],
    ids=["all", "linear", "whole", "small"],
)
def test_predictions_equal_mmsegmentations_loop(changes):
    scene = Noise(48, 77)
    got = predict(scene, **changes)
    want = reference(scene, SCHEDULE._replace(**changes))
    # Two classes may be equal but for rounding somewhere.
    assert np.mean(got != want) < 1e-3
    assert len(np.unique(want)) > 2


def test_the_batch_of_windows_changes_nothing():
    scene = Noise(60, 50)
    for batch in (1, 2, 100):
        assert np.array_equal(predict(scene, batch=batch), predict(scene))


def test_constant_logits_stay_constant():
    """Through windows, sizes and mirror images, the largest stays the largest."""
    close = np.array([0.0, 1e-4, 0.0, 0.0, -1.0], np.float32)

    def logits(windows):
        n, height, width, _ = windows.shape
        return np.broadcast_to(close, (n, height // PATCH, width // PATCH, CLASSES))

    assert (predict(Noise(57, 91), logits) == 1).all()


def test_a_symmetric_image_has_a_symmetric_prediction():
    scene = Noise(48, 77)
    scene.pixels = np.concatenate([scene.pixels, scene.pixels[:, ::-1]], axis=1)
    # Features that are not symmetric themselves.
    shift = np.linspace(-1, 1, 3, dtype=np.float32)

    def logits(windows):
        found = patch_means(windows)
        return found + shift[0] * np.arange(found.shape[2])[:, None] * MIX[0]

    classes = predict(scene, logits)
    assert np.mean(classes != classes[:, ::-1]) < 1e-3
    one_way = predict(scene, logits, flips=(False,))
    assert np.mean(one_way != one_way[:, ::-1]) > 0.01


def test_mosaics_are_read_in_every_size():
    read = sliding.ReadViews(mosaics.scenes("val"), [120, 60])
    views = read(0)
    assert [image.shape for image in views.sizes] == [(120, 160, 3), (60, 80, 3)]
    assert views.mask.shape == views.pixels.shape[:2] == (240, 320)
