"""Results in order, an end to what was interrupted, and triplets against an SVD."""

import os
import threading

import numpy as np
import pytest
import scipy.linalg

from samples import AWKWARD, error_of
from sinder_jax import linalg


def test_results_come_in_the_order_of_the_jobs_with_their_progress():
    told = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    results = linalg.in_parallel(lambda job: job * job, range(5), progress)
    assert list(results) == [0, 1, 4, 9, 16]
    assert told == [(done, 5) for done in range(1, 6)]


def test_an_error_of_a_job_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(linalg.in_parallel(lambda job: 1 / job, [1, 0, 2]))


def test_jobs_that_have_not_begun_when_it_is_interrupted_are_left_out():
    """As by a signal that stops a run while its kernels are factorized."""
    begun, go_on = [], threading.Event()
    workers = min(os.cpu_count() or 1, linalg.MOST_AT_ONCE)

    def work(job):
        begun.append(job)
        if job:
            go_on.wait(0.2)

    results = linalg.in_parallel(work, range(20 * workers))
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert len(begun) <= 3 * workers


def test_results_of_a_kernel_come_together_in_the_order_of_its_blocks():
    told = []
    results = linalg.by_kernel(
        lambda name, block: f"{name}{block}", ["b", "a"], 3, lambda *at: told.append(at)
    )
    assert next(results) == ("b", ["b0", "b1", "b2"])
    assert told[:3] == [(1, 6), (2, 6), (3, 6)]
    assert list(results) == [("a", ["a0", "a1", "a2"])]
    assert told == [(done, 6) for done in range(1, 7)]


def test_closing_the_results_by_kernel_drops_jobs_that_have_not_begun():
    begun, go_on = [], threading.Event()
    workers = min(os.cpu_count() or 1, linalg.MOST_AT_ONCE)

    def work(name, block):
        begun.append((name, block))
        if name == "b":
            go_on.wait(0.2)

    results = linalg.by_kernel(work, ["a", "b"], 20 * workers)
    next(results)
    results.close()
    assert len(begun) <= 23 * workers


# --- Singular values ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 9), (9, 40), (40, 9), (1, 7), (7, 1)], ids=str)
def test_leading_triplets_are_those_of_an_svd(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    count = min(3, *shape)
    u, s, v = linalg.leading_triplets(matrix, count)
    assert u.shape == (shape[0], count) and v.shape == (shape[1], count)
    np.testing.assert_allclose(s, scipy.linalg.svdvals(matrix)[:count], rtol=1e-12)
    np.testing.assert_allclose(matrix @ v, u * s, atol=1e-12)  # signs belong together
    for vectors in (u, v):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_leading_triplets_of_equal_singular_values_are_all_found(count):
    """LAPACK loses some in a tenth of these; in which, depends on the machine."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        line = rng.normal(size=48)
        matrix = np.eye(48) - np.outer(line, line) / (line @ line)
        u, s, v = linalg.leading_triplets(matrix, count)
        np.testing.assert_allclose(s, np.ones(count), rtol=1e-12)
        np.testing.assert_allclose(matrix @ v, u, atol=1e-12)
        np.testing.assert_allclose(u.T @ u, np.eye(count), atol=1e-12)


def test_leading_triplets_of_zero_are_zero_and_too_many_raise():
    _, s, v = linalg.leading_triplets(np.zeros((3, 5)), 2)
    assert not s.any() and not v.any()
    for count in (0, 4):
        message = error_of(linalg.leading_triplets, np.ones((5, 3)), count)
        assert f"5 x 3 has 1 to 3 singular values, not {count}" in message


@pytest.mark.parametrize("shape", AWKWARD)
def test_singular_values_match_an_svd(shape):
    for matrix in (AWKWARD[shape], 0 * AWKWARD[shape]):
        exact = np.linalg.svd(matrix, compute_uv=False)
        # The Gram matrix's largest eigenvalue: S·2e-16, halved by the root.
        leading = linalg.leading_triplets(matrix, 1).s[0]
        np.testing.assert_allclose(leading, exact[0], rtol=1e-13, atol=0)
        values = linalg.singular_values(matrix)
        np.testing.assert_allclose(values, exact, rtol=2e-8, atol=1e-15 * exact[0])


# --- Running products -----------------------------------------------------------------


def test_triplets_of_running_products_are_those_of_an_svd():
    """Of more matrices than are multiplied together at once."""
    depth, rng, told = linalg.BLOCKS_AT_ONCE + 3, np.random.default_rng(2), []
    maps = 1e3 * rng.normal(size=(depth, 6, 6))
    found = list(
        linalg.running_triplets(maps.__getitem__, depth, 2, lambda *at: told.append(at))
    )
    assert told == [(done, depth) for done in range(1, depth + 1)]
    product = np.eye(6)
    for one, (triplets, log_scale) in zip(maps, found, strict=True):
        product = one @ product
        u, s, vt = np.linalg.svd(product)
        np.testing.assert_allclose(np.log(triplets.s) + log_scale, np.log(s[:2]))
        np.testing.assert_allclose(np.abs(np.sum(triplets.u * u[:, :2], axis=0)), 1)
        np.testing.assert_allclose(np.abs(np.sum(triplets.v * vt[:2].T, axis=0)), 1)
