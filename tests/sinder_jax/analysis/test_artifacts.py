"""Measures of defective tokens against sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.analysis import artifacts

DIRECTION = np.eye(64)[0].astype(np.float32)


@pytest.fixture
def sound():
    return np.asarray(jax.random.normal(jax.random.key(0), (10, 10, 64)))


@pytest.fixture
def thrown(sound):
    tokens = sound.copy()
    tokens[4, 5] = tokens[7, 3] = 100 * DIRECTION
    return tokens


def test_tail_estimates_the_exponent_of_a_pareto_tail():
    # 500 of 10,000 norms: the estimate's standard error is 1/(2·√500) = 0.022.
    norms = np.random.default_rng(0).pareto(2.0, (100, 100)) + 1
    assert artifacts.tail_size(norms.size) == 500
    assert float(artifacts.tail(norms)) == pytest.approx(0.5, abs=0.07)
    assert float(artifacts.tail(7 * norms)) == pytest.approx(
        float(artifacts.tail(norms)), abs=1e-4
    )


def test_tail_is_the_mean_of_the_logs_over_the_first_norm_below():
    norms = np.random.default_rng(1).uniform(1, 9, (6, 10))
    ordered = np.sort(norms.ravel())[::-1]
    expected = np.mean([np.log(ordered[i] / ordered[3]) for i in range(3)])
    assert artifacts.tail_size(60) == 3
    # float32 logarithms of numbers up to 9.
    assert float(artifacts.tail(norms)) == pytest.approx(expected, abs=1e-6)


def test_tokens_without_length_have_no_tail():
    assert np.isnan(float(artifacts.tail(np.zeros((3, 3)))))


def test_a_token_along_the_direction_is_neither_sound_nor_thrown(sound):
    before = sound.copy()
    before[2, 2] = np.linalg.norm(sound[2, 2]) * DIRECTION  # as long as any other
    found = artifacts.sums(before, before, DIRECTION, sound)
    assert float(found.along_before) == float(found.along) == 1
    assert float(found.large_before) == float(found.thrown) == 0
    assert float(found.sound) == 99
    assert float(found.kept) == pytest.approx(99, abs=1e-3)
    assert float(found.true_sound) == pytest.approx(99, abs=1e-3)


def test_cosines_are_with_the_model_before_and_with_the_truth(sound, thrown):
    truth = -sound
    found = artifacts.sums(sound, thrown, DIRECTION, truth)
    assert float(found.kept) == pytest.approx(98, abs=1e-3)
    assert float(found.true_sound) == pytest.approx(-98, abs=1e-3)
    assert float(found.true_thrown) == pytest.approx(-2, abs=1e-4)


def test_a_thrown_token_makes_tail_and_ratio_heavier(sound, thrown):
    before = artifacts.sums(sound, thrown, DIRECTION)
    after = artifacts.sums(thrown, thrown, DIRECTION)
    assert float(after.large) == float(after.large_before) == float(before.thrown) == 2
    assert float(before.large) == float(before.along) == 0
    assert float(after.along) == 2
    assert float(after.tail) > 2 * float(before.tail)
    assert float(after.norm_ratio) > 5 * float(before.norm_ratio)


def test_damage_is_seen_in_sound_tokens_alone(sound, thrown):
    same = artifacts.sums(sound, thrown, DIRECTION, sound)
    assert float(same.sound) == 98
    assert float(same.kept) == pytest.approx(98, abs=1e-3)
    assert float(same.true_thrown) == pytest.approx(2, abs=1e-4)
    damaged = sound.copy()
    damaged[0] = -damaged[0]
    found = artifacts.sums(damaged, thrown, DIRECTION, sound)
    assert float(found.kept) == pytest.approx(78, abs=1e-3)
    assert float(found.true_sound) == pytest.approx(78, abs=1e-3)
    assert float(found.true_thrown) == pytest.approx(2, abs=1e-4)


def test_a_smooth_map_varies_less_than_noise(sound):
    rows, columns = np.mgrid[:10, :10] / 9
    smooth = np.zeros((10, 10, 64), np.float32)
    smooth[..., 0], smooth[..., 1] = rows, 0.5 * columns
    smooth[..., 2] = 0.2 * rows * columns
    smooth_variation = float(artifacts.pca_variation(smooth))
    assert smooth_variation < 0.5 * float(artifacts.pca_variation(sound))


def test_variation_of_a_photograph_is_that_of_its_patches():
    pixels = np.zeros((28, 42, 3), np.uint8)
    pixels[:, 14:28] = (10, 200, 0)
    # Red and green have range 0 to 1: two edges of two patches each; blue is constant.
    assert artifacts.photograph_variation(pixels, 14) == pytest.approx(8)
    assert artifacts.photograph_variation(np.full((28, 42, 3), 9, np.uint8), 14) == 0
    assert float(artifacts.variation(jnp.arange(6.0).reshape(2, 3, 1))) == 9 + 4
