import numpy as np
import pytest

from samples import SMALL, random_params
from sinder_jax import defects, factor
from sinder_jax.model import Model
from sinder_jax.storage import original
from sinder_jax.storage.original import Original


@pytest.mark.parametrize("kind", ["mlp", "swiglu-registers"])
def test_an_original_comes_back_with_the_same_bytes(kind, tmp_path):
    config, params = SMALL[kind], random_params(SMALL[kind])
    factors = factor.factorize(config, params)
    directions = np.asarray(defects.singular_defect_directions(config, params))
    given = Original(Model.of(config, params, {"source": "x"}), factors, directions)
    original.save(tmp_path / "frozen", given)
    got = original.load(tmp_path / "frozen")
    assert got.model.config == config and got.model.provenance == {"source": "x"}
    assert got.model.digest == given.model.digest
    np.testing.assert_array_equal(got.directions, directions)
    for part in original.PARTS:
        stored, want = getattr(got.factors, part), getattr(factors, part)
        assert stored.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(stored[name], array)
