"""The number of devices does not change a bit: in a process with eight simulated ones.

1, 2, 4 and 8 of them share the same eight images per step, each with the whole model or
with the model split over them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import synthetic
from samples import error_of
from sinder_jax import planted, repair, vit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    [("planted", 20), ("moving", 8)],
)
def test_any_number_of_devices_gives_the_same_bits(name, steps):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "step_hashes", name, str(steps)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    expected, defects = told["1"]
    assert len(set(expected)) > 1 and defects >= 8  # it did repair something
    assert len(told) == 7
    for way, (hashes, _) in told.items():
        assert hashes == expected, way


def sharding_of(*axes):
    mesh = Mesh(np.array(jax.devices()[:2]), ("images",))
    return NamedSharding(mesh, PartitionSpec(*axes))


def test_a_sharding_of_another_kind_is_refused():
    config = vit.ViTConfig(16, 1, 1, "mlp", img_size=28)
    options = repair.RepairOptions()
    for axes in ((), (None, "images")):
        message = error_of(repair.make_step, config, options, sharding_of(*axes))
        assert "PartitionSpec(axis)" in message


def test_images_that_the_devices_do_not_divide_are_refused():
    config = vit.ViTConfig(16, 1, 1, "mlp", img_size=28)
    step = repair.make_step(config, repair.RepairOptions(), sharding_of("images"))
    params = synthetic.random_params(config)
    frozen, state = repair.init(config, params, repair.RepairOptions())
    images = jnp.zeros((3, 28, 28, 3))
    message = error_of(step, state, frozen, images)
    assert "3 images" in message and "2 devices" in message


def test_matrices_are_split_and_vectors_are_whole():
    config = vit.ViTConfig(16, 2, 1, "swiglu", img_size=28)
    params = synthetic.random_params(config)
    trees = repair.init(config, params, repair.RepairOptions())
    frozen, state = (repair.shard(tree, sharding_of("images")) for tree in trees)

    def share(x):
        return x.addressable_shards[0].data.size / x.size

    for split in (state.merged, frozen.factors.u, frozen.factors.v):
        assert {share(x) for x in split.values()} == {0.5}
    assert share(frozen.params["blocks"]["attn"]["qk"]["kernel"]) == 0.5
    assert share(frozen.params["blocks"]["attn"]["v"]["bias"]) == 1
    assert share(frozen.params["patch_embed"]["kernel"]) == 1
    assert {share(x) for x in frozen.factors.sigma.values()} == {1}
    assert {share(x) for x in state.eps.values()} == {1}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
def test_two_thousand_steps_take_no_more_memory_than_two_hundred():
    made = planted.planted_model(1)
    options = repair.RepairOptions(
        lr=1e-6, max_iter=10**6, history=10**5, mask_thr=0.5, min_outliers=1
    )
    frozen, state = repair.init(made.config, made.params, options)
    step = repair.make_step(made.config, options)
    image = jnp.asarray(np.random.default_rng(0).standard_normal((1, 56, 56, 3)))
    image = image.astype(jnp.float32)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    for count in range(2_200):
        state, metrics = step(state, frozen, image)
        if count == 200:
            float(metrics.skipped)  # waits for the step
            before = resident()
    assert not bool(metrics.done) and int(metrics.layer[0]) >= 0
    assert resident() < 1.02 * before
    assert step._cache_size() == 1
