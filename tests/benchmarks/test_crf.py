import numpy as np
import pytest

from sinder_jax.evals import crf


def test_the_baseline_computes_the_same():
    pytest.importorskip("torch")
    from benchmarks import crf as benchmark

    rng = np.random.default_rng(0)
    image = rng.integers(100, 120, (12, 14, 3)).astype(np.uint8)
    maps = rng.dirichlet(np.ones(5), (12, 14)).astype(np.float32)
    expected = np.asarray(crf.mean_field(maps, image))
    for keep in (False, True):
        found = benchmark.dense(maps, image, keep=keep)
        np.testing.assert_allclose(found, expected, atol=1e-5)
