"""run/runner.py: the same state and params wherever the devices are."""

import dataclasses

import jax
import numpy as np
import pytest

import photos
import small_runs
from experiments.run import inputs
from experiments.run.runner import Runner, choose_devices
from samples import error_of
from sinder_jax import planted, repair
from sinder_jax.data import batches, listing


def test_devices_share_the_images_of_a_step_evenly():
    here = jax.local_device_count()
    assert here == 2, "tests/conftest.py simulates two"
    assert choose_devices(1, 1) == (jax.devices()[0],)
    assert choose_devices(2, 1) == choose_devices(4, 1) == tuple(jax.devices())
    assert choose_devices(3, 1) == (jax.devices()[0],)
    assert "must be a multiple of the 2 processes" in error_of(choose_devices, 3, 2)


@pytest.fixture(scope="module")
def started():
    """The planted model, and two images that show its defect."""
    config = small_runs.config(max_iter=12)
    options = inputs.repair_options(config)
    made = planted.planted_model(config.seed)
    model = dataclasses.replace(made.config, interpolate_antialias=True)
    images = [
        photos.prepared(file, config.image_size) for file in listing.sample_images()[:2]
    ]

    def start(devices, split):
        frozen, state = repair.init(model, made.params, options)
        return Runner(model, options, frozen, state, devices, split=split)

    return start, np.stack(images)


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True], ids=["copied", "split"])
def test_two_devices_end_where_one_does_bit_for_bit(started, split):
    start, images = started
    batch = batches.Batch(np.arange(2), images, np.array([True, True]), [])
    ends = []
    for devices in (jax.devices()[:1], jax.devices()[:2]):
        runner = start(devices, split)
        for _ in range(3):
            metrics = runner.step(batch)
        assert np.ravel(metrics.layer).shape == (2,)
        ends.append((runner.saved(), runner.params()))
    (saved, params), (saved_2, params_2) = ends
    assert int(saved["num_images"]) == 6
    assert any(np.any(e) for e in jax.tree.leaves(saved["eps"]))
    for one, two in zip(jax.tree.leaves(saved), jax.tree.leaves(saved_2), strict=True):
        assert isinstance(two, np.ndarray) and one.dtype == two.dtype
        assert one.tobytes() == two.tobytes()
    assert jax.tree.structure(params) == jax.tree.structure(params_2)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_2))
