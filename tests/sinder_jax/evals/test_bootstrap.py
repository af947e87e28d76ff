import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import bootstrap


def share(total, images):
    return {"right": float(total / images)}


def hits(shares, images=400, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.random(images) < each for each in shares]).astype(float)


def test_the_interval_of_a_share_is_the_normal_one():
    counts = hits([0.8])
    found = bootstrap.samples(counts, share, resamples=4000)["right"]
    low, high = bootstrap.interval(found)
    p = counts.mean()
    half = 1.96 * np.sqrt(p * (1 - p) / 400)  # 0.04; the bootstrap's own noise: 0.002
    assert abs(low - (p - half)) < 0.004 and abs(high - (p + half)) < 0.004


def test_equal_models_differ_by_nothing():
    counts = hits([0.8])
    a, b = (bootstrap.samples(counts, share, resamples=50)["right"] for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_an_image_that_is_hard_for_both_does_not_widen_the_difference():
    first = hits([0.5])
    second = first.copy()
    second[0, np.flatnonzero(first[0] == 0)[:20]] = 1  # 20 more are right
    a, b = (
        bootstrap.samples(each, share, resamples=1000)["right"]
        for each in (first, second)
    )
    low, high = bootstrap.interval(b - a)
    assert low > 0.02 and high < 0.08  # 0.05; unpaired it would be 0.05 ± 0.07


def test_seeds_are_drawn_too():
    counts = np.stack([np.ones(100), np.zeros(100)])  # images all alike, seeds not
    found = bootstrap.samples(counts, share, resamples=500)["right"]
    assert set(found) == {0.0, 0.5, 1.0}


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    counts = hits([0.3, 0.6], images=37)
    whole = bootstrap.samples(counts, share, resamples=20)["right"]
    again = bootstrap.samples(counts, share, resamples=20, seed=1)["right"]
    assert not np.array_equal(whole, again)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 37 * 20)
    np.testing.assert_array_equal(
        bootstrap.samples(counts, share, resamples=20)["right"], whole
    )


def test_scores_that_are_no_means_are_computed_from_sums():
    counts = np.random.default_rng(0).integers(0, 9, (1, 30, 2)).astype(float)
    found = bootstrap.samples(
        counts, lambda total, n: {"ratio": total[0] / total[1]}, resamples=200
    )["ratio"]
    total = counts[0].sum(0)
    assert abs(found.mean() - total[0] / total[1]) < 0.05


@pytest.mark.parametrize("shape, resamples", [((1, 0), 5), ((0, 3), 5), ((1, 3), 0)])
def test_nothing_to_draw_raises(shape, resamples):
    message = error_of(bootstrap.samples, np.zeros(shape), share, resamples=resamples)
    assert "expected at least 1 of each" in message
