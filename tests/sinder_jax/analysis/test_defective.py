"""defective.py: what counts as a defective token, against the reference and by hand."""

import doctest
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import golden
import reference
from samples import error_of
from sinder_jax import loss
from sinder_jax.analysis import defective, pca
from sinder_jax.analysis.tokens import token_norms


@pytest.fixture(scope="module")
def direction():
    vector = np.random.default_rng(2).normal(size=64).astype(np.float32)
    return jnp.asarray(vector / np.linalg.norm(vector))


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(defective)
    assert result.attempted >= 6 and result.failed == 0


# --- Along a direction ----------------------------------------------------------------


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_detection_matches_reference_and_recording(name):
    patches, direction = golden.patches(name)
    arrays, meta = golden.load(name)
    options = {"mask_thr": meta["mask_thr"], "window": meta["kernel"]}
    found = defective.detect(patches, direction, **options)
    expected = reference.outlier_logits(np.float64(patches), np.float64(direction))
    np.testing.assert_allclose(found.logits, expected, atol=1e-6)
    np.testing.assert_array_equal(found.mask, arrays["step0/mask"])
    np.testing.assert_array_equal(
        found.mask, reference.outlier_mask(expected, **options)
    )


def test_outliers_are_those_of_the_loss(direction):
    tokens = np.random.default_rng(4).normal(size=(9, 7, 64)).astype(np.float32)
    tokens[4, 3] += 20 * np.asarray(direction)
    tokens[0, 3] += 20 * np.asarray(direction)  # on the border, never one
    mask = defective.detect(tokens, direction, mask_thr=3.0).mask
    _, aux = loss.neighbor_loss(jnp.asarray(tokens), direction, mask_thr=3.0)
    np.testing.assert_array_equal(mask, aux.mask)
    assert np.argwhere(mask).tolist() == [[4, 3]]


def test_options_out_of_range_raise():
    patches, direction = golden.patches("swiglu")
    call = functools.partial(error_of, defective.detect, patches, direction)
    assert "mask_thr must be above 0, got 0.0" in call(mask_thr=0.0)
    assert "window must be 3 or 5" in call(window=7)


# --- By norm --------------------------------------------------------------------------


def test_norm_ratio_and_large_norms_use_the_median_not_the_mean():
    norms = np.array([[1.0, 2.0, 2.0], [2.0, 2.0, 600.0]], np.float32)  # mean 101
    assert float(defective.norm_ratio(norms)) == 300.0
    assert int(defective.large_norms(norms).sum()) == 1


def test_a_norm_of_exactly_factor_times_the_median_is_not_large():
    norms = np.array([[2.0, 2.0, 2.0, 6.0, 6.5]], np.float32)
    assert int(defective.large_norms(norms).sum()) == 1
    assert int(defective.large_norms(norms, factor=2.9).sum()) == 2
    assert int(defective.large_norms(norms, factor=4.0).sum()) == 0


def test_every_image_has_a_median_of_its_own():
    norms = np.ones((2, 3, 3), np.float32)
    norms[1] *= 10.0
    norms[1, 1, 1] = 31.0
    large = np.asarray(defective.large_norms(norms))
    assert large.sum() == 1 and large[1, 1, 1]
    np.testing.assert_allclose(defective.norm_ratio(norms), [1.0, 3.1], rtol=1e-6)


def test_a_defective_token_is_large_and_along_the_direction():
    norms = np.ones((5, 5), np.float32)
    norms[1:4, 1] = 9.0
    degrees, detected = np.full((5, 5), 80.0), np.zeros((5, 5), bool)
    degrees[1, 1] = degrees[4, 4] = 30.0  # near the direction; the second is short
    detected[2, 1] = detected[4, 0] = True  # outliers; the second is short
    found = np.argwhere(defective.is_defective(norms, degrees, detected))
    assert found.tolist() == [[1, 1], [2, 1]]


# --- One photograph -------------------------------------------------------------------


def test_maps_are_those_of_analysis(direction):
    tokens = np.random.default_rng(4).normal(size=(9, 7, 64)).astype(np.float32)
    tokens = jnp.asarray(tokens).at[4, 3].add(20 * direction)
    maps = defective.token_maps(tokens, direction, mask_thr=3.0)
    np.testing.assert_array_equal(maps.norms, token_norms(tokens))
    np.testing.assert_array_equal(maps.pca, pca.pca_rgb(tokens))
    assert maps.mask.sum() == 1 and maps.mask[4, 3]
    with pytest.raises(FloatingPointError, match="not finite"):
        defective.token_maps(tokens.at[0, 0, 0].set(jnp.inf), direction, mask_thr=3.0)


def test_description_counts_outliers_and_compares_norms():
    norms, mask = np.full((8, 8), 50.0), np.zeros((8, 8), bool)
    image = np.zeros((8, 8, 3), np.uint8)

    def described():
        return defective.describe(defective.TokenMaps(image, norms, mask))

    assert described() == "0 outliers, max norm 1.0 x median"
    norms[1, 1], mask[1, 1] = 500.0, True
    assert described() == "1 outlier, max norm 10.0 x median"
    mask[2, 2] = True
    assert described() == "2 outliers, max norm 10.0 x median"


def test_measures_of_tokens_made_by_hand():
    """A flat field of norm 2; one token thrown along the direction, one across it."""
    direction = jnp.asarray(np.eye(8, dtype=np.float32)[0])
    before = np.zeros((6, 6, 8), np.float32)
    before[..., 1] = 2.0
    after = before.copy()
    before[2, 2, 0] = 10.0  # norm √104, an outlier
    before[3, 4, 1] = 7.0  # large, but not along the direction
    before[0, 3, 0] = 20.0  # on the border: never an outlier, but large
    after[3, 4, 1] = 5.0  # still there, no more than 3 x the median
    after[1, 1, 2] = 2.0  # a sound token turned by 45 degrees
    numbers = defective.measure(
        jnp.asarray(before), jnp.asarray(after), direction, mask_thr=1.0
    )
    assert numbers == {
        "outliers_before": 1,
        "large_norms_before": 3,
        "norm_ratio_before": pytest.approx(np.sqrt(404) / 2, rel=1e-6),
        "outliers_after": 0,
        "large_norms_after": 0,
        "norm_ratio_after": pytest.approx(2.5, rel=1e-6),
        # 33 of 36 were sound; one of them has the cosine of 45 degrees.
        "cosine_of_sound_tokens": pytest.approx((32 + np.sqrt(0.5)) / 33, rel=1e-6),
    }
    json.dumps(numbers)  # plain numbers
