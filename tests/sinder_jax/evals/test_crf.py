import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import crf

# Rounding grows from one iteration to the next: 2e-7 after one, where no label is sure
# up to 8e-6 after ten.
ATOL = 1e-5


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def brute_force(
    probabilities,
    image,
    iterations=10,
    smoothness=(3, 1),
    appearance=(4, 67, 3),
    include_self=True,
    both_sides=True,
):
    """The spec's section 8 in float64, with both kernels as whole matrices."""
    height, width, classes = probabilities.shape
    places = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2).astype(np.float64)
    colors = image.reshape(-1, 3).astype(np.float64)
    kernels = []
    for f in (
        places / smoothness[1],
        np.concatenate([places / appearance[1], colors / appearance[2]], axis=1),
    ):
        k = np.exp(-0.5 * ((f[:, None] - f[None]) ** 2).sum(-1))
        if not include_self:
            np.fill_diagonal(k, 0)
        d = k.sum(1) + 1e-20
        root = np.sqrt(d)
        kernels.append(k / root[:, None] / root if both_sides else k / d[:, None])
    unary = -np.log(np.clip(probabilities.reshape(-1, classes), 1e-5, 1))
    q = softmax(-unary)
    for _ in range(iterations):
        message = smoothness[0] * kernels[0] @ q + appearance[0] * kernels[1] @ q
        q = softmax(-unary + message)
    return q.reshape(probabilities.shape)


def spec_example():
    i, j = np.mgrid[:4, :6]
    logits = np.stack(
        [
            1.5 * np.cos(i + j),
            1.5 * np.sin(1.3 * i - 0.7 * j),
            0.75 * np.cos(2 * j - i),
        ],
        axis=-1,
    )
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :3], image[:, 3:], image[2, 4] = (10, 20, 30), (200, 180, 160), 120
    return softmax(logits), image


def test_the_spec_s_example_gives_its_numbers():
    probabilities, image = spec_example()
    once = np.asarray(crf.mean_field(probabilities, image, iterations=1))
    np.testing.assert_allclose(once[0, 0], [0.59940, 0.18217, 0.21843], atol=5.1e-6)
    found = np.asarray(crf.mean_field(probabilities, image))
    np.testing.assert_allclose(found[0, 0], [0.00628, 0.99084, 0.00289], atol=5.1e-6)
    np.testing.assert_array_equal(found.argmax(-1), [[1, 1, 1, 0, 0, 0]] * 4)


def photograph_like(height=20, width=26, classes=4, seed=0):
    """Probabilities, and an image with slopes, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([4 * y, 3 * x, 90 + 60 * ((x - 9) ** 2 + (y - 8) ** 2 < 40)], -1)
    image = (base + rng.integers(0, 6, base.shape)).astype(np.uint8)
    image[:, width // 2 :] += 80
    logits = 2 * rng.standard_normal((height, width, classes))
    return softmax(logits), image


@pytest.mark.parametrize("block", [None, 16, 100])
def test_marginals_are_those_of_whole_matrices(block):
    probabilities, image = photograph_like()
    found = crf.mean_field(probabilities, image, block=block)
    assert found.shape == probabilities.shape and found.dtype == jnp.float32
    expected = brute_force(probabilities, image)
    np.testing.assert_allclose(found, expected, atol=ATOL)
    once = crf.mean_field(probabilities, image, iterations=1, block=block)
    expected_once = brute_force(probabilities, image, 1)
    np.testing.assert_allclose(once, expected_once, atol=5e-7)
    assert (expected.argmax(-1) != probabilities.argmax(-1)).mean() > 0.1


@pytest.mark.parametrize(
    "convention",
    [{"include_self": False}, {"both_sides": False}, {"iterations": 9}],
    ids=str,
)
def test_other_conventions_give_other_marginals(convention):
    probabilities, image = photograph_like()
    found = crf.mean_field(probabilities, image)
    wrong = brute_force(probabilities, image, **convention)
    assert np.abs(found - wrong).max() > 1e-3


def test_options_mean_what_they_say():
    probabilities, image = photograph_like()
    found = crf.mean_field(
        probabilities,
        image,
        iterations=3,
        smoothness_weight=1.5,
        smoothness_sigma=2.5,
        appearance_weight=2.5,
        position_sigma=6.0,
        color_sigma=12.0,
    )
    expected = brute_force(probabilities, image, 3, (1.5, 2.5), (2.5, 6, 12))
    np.testing.assert_allclose(found, expected, atol=ATOL)


def listed_and_kernel(image, size):
    """Which pairs of pixels are in a listed pair of blocks, and K₂ of all of them."""
    blocks = crf._arrange(image, 0.5 / 67**2, 0.5 / 3**2, size)
    order, count = blocks.order, len(blocks.features[0])
    assert sorted(order) == list(range(len(order)))  # whole blocks
    listed = np.zeros((count, count), bool)
    listed[blocks.first[: blocks.num_pairs], blocks.second[: blocks.num_pairs]] = True
    listed = (listed | listed.T).repeat(size, axis=0).repeat(size, axis=1)
    places = np.stack(np.mgrid[: image.shape[0], : image.shape[1]], -1) / 67
    f = np.concatenate([places, image / 3], axis=2).reshape(-1, 5)[order]
    return listed, np.exp(-0.5 * ((f[:, None] - f[None]) ** 2).sum(-1))


def test_pairs_are_left_out_below_rounding():
    _, image = photograph_like()
    listed, kernel = listed_and_kernel(image, 1)  # boxes of one pixel: nothing to spare
    np.testing.assert_array_equal(listed, kernel > 2**-24 / len(kernel))


def test_what_blocks_leave_out_is_below_rounding():
    _, image = photograph_like(48, 48)
    listed, kernel = listed_and_kernel(image, 64)
    assert listed.mean() < 0.6  # or there is nothing to see here
    assert 0 < (kernel * ~listed).sum(1).max() <= 2**-24
    assert np.isclose(crf.pairs_left(image, block=64), listed.mean())


def test_label_maps_of_an_image_do_not_mix():
    probabilities, image = photograph_like()
    maps = np.stack([probabilities, probabilities[::-1], probabilities[..., ::-1]])
    found = crf.mean_field(maps, image)
    assert found.shape == maps.shape
    for each, alone in zip(found, maps, strict=True):
        expected = crf.mean_field(alone, image)
        np.testing.assert_allclose(each, expected, atol=1e-6)  # sums in another order
    np.testing.assert_allclose(found[2][..., ::-1], found[0], atol=1e-6)


def test_flipping_the_image_flips_the_marginals():
    probabilities, image = photograph_like()
    found = crf.mean_field(probabilities[:, ::-1], image[:, ::-1])
    expected = crf.mean_field(probabilities, image)
    np.testing.assert_allclose(found[:, ::-1], expected, atol=ATOL)


@pytest.mark.parametrize(
    "shape, colors",
    [
        ((1, 1, 3), 1),
        ((1, 17, 2), 255),
        ((19, 1, 2), 2),
        ((28, 28, 1), 255),
        ((3, 2, 40), 2),
    ],
    ids=str,
)
def test_small_images_few_classes_and_few_colors(shape, colors):
    rng = np.random.default_rng(1)
    image = (rng.integers(0, colors, (*shape[:2], 3)) * (255 // colors)).astype(
        np.uint8
    )
    probabilities = softmax(2 * rng.standard_normal(shape))
    found = crf.mean_field(probabilities, image, block=50)
    np.testing.assert_allclose(found, brute_force(probabilities, image), atol=ATOL)


def test_an_image_of_one_color_has_all_pairs():
    image = np.full((40, 40, 3), 128, np.uint8)
    probabilities = softmax(np.random.default_rng(0).standard_normal((40, 40, 3)))
    blocks = crf._arrange(image, 0.5 / 67**2, 0.5 / 3**2, 64)
    assert blocks.num_pairs == len(blocks.first) == 25 * 26 // 2
    found = crf.mean_field(probabilities, image, block=64)
    np.testing.assert_allclose(found, brute_force(probabilities, image), atol=ATOL)


def test_certainty_is_clipped_and_sums_do_not_matter():
    probabilities, image = photograph_like()
    certain = np.eye(4)[probabilities.argmax(-1)]
    found = crf.mean_field(certain, image, iterations=0)
    assert np.isclose(found.max(), 1 / (1 + 3e-5)) and np.isclose(found.min(), 1e-5)
    np.testing.assert_allclose(
        crf.mean_field(certain, image), brute_force(certain, image), atol=ATOL
    )
    found = crf.mean_field(probabilities / 2, image)
    expected = crf.mean_field(probabilities, image)
    np.testing.assert_allclose(found, expected, atol=ATOL)


def test_arrays_may_be_strided_or_jax_s():
    probabilities, image = photograph_like()
    expected = crf.mean_field(probabilities, image)
    wide = np.asfortranarray(probabilities.astype(np.float32)), image[:, :, ::-1]
    found = crf.mean_field(wide[0], wide[1][:, :, ::-1])
    np.testing.assert_array_equal(found, expected)
    found = crf.mean_field(jnp.asarray(probabilities, jnp.float32), jnp.asarray(image))
    np.testing.assert_array_equal(found, expected)
    coarse = crf.mean_field(jnp.asarray(probabilities, jnp.bfloat16), image)
    assert coarse.dtype == jnp.float32


def test_x64_changes_nothing():
    probabilities, image = photograph_like()
    expected = crf.mean_field(probabilities, image)
    with jax.enable_x64(True):
        found = crf.mean_field(probabilities, image)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"probabilities": np.ones((4, 6))}, "expected [height, width, C] or [n, "),
        ({"probabilities": np.ones((6, 4, 2)) / 2}, "got probabilities (6, 4, 2) and"),
        ({"probabilities": np.ones((4, 6, 0))}, "none of them 0"),
        ({"probabilities": np.ones((0, 4, 6, 2))}, "none of them 0"),
        ({"image": np.zeros((4, 6, 4), np.uint8)}, "an image (4, 6, 4)"),
        (
            {"image": np.zeros((4, 6, 3), np.float32)},
            "got an image of float32, expected",
        ),
        ({"probabilities": np.ones((4, 6, 2), int)}, "got probabilities of int64"),
        ({"probabilities": np.full((4, 6, 2), np.nan)}, "from nan to nan, expected 0"),
        ({"probabilities": np.full((4, 6, 2), np.inf)}, "from inf to inf, expected 0"),
        (
            {"probabilities": np.full((4, 6, 2), -0.1)},
            "from -0.1 to -0.1, expected 0 to",
        ),
        ({"probabilities": np.full((4, 6, 2), 3.0)}, "use the softmax of logits"),
        ({"iterations": -1}, "got iterations=-1, expected at least 0"),
        ({"smoothness_weight": 1e7}, "got smoothness_weight=10000000.0, expected 0"),
        ({"block": 0}, "got block=0, expected at least 1"),
        ({"color_sigma": 0.0}, "got color_sigma=0.0, expected 0.001 to 1e+06"),
        ({"smoothness_sigma": float("nan")}, "got smoothness_sigma=nan, expected"),
        (
            {"appearance_weight": -1.0},
            "got appearance_weight=-1.0, expected 0 to 1e+06",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_raises(change, message):
    image = np.zeros((4, 6, 3), np.uint8)
    given = {"probabilities": np.full((4, 6, 2), 0.5), "image": image}
    assert message in error_of(crf.mean_field, **(given | change))
