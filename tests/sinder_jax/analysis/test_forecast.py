"""forecast.py: planted defects are named from the weights, and only those."""

import doctest
import functools

import jax
import numpy as np
import pytest

import photos
import reference
from experiments import config as config_files
from experiments.run import inputs
from recorded import recorded_model, reference_model
from samples import error_of, relative
from sinder_jax import defects, kernels, linalg, param_tree, planted, repair, vit
from sinder_jax.analysis import forecast, spectra
from sinder_jax.data import listing

SEEDS = (0, 1, 7)
SMALL_MODELS = {  # two FFNs, with and without registers
    "mlp": vit.ViTConfig(64, 12, 1, "mlp", img_size=28),
    "swiglu-registers": vit.ViTConfig(96, 12, 1, "swiglu", 28, 14, 4, True, 0.0),
}
DEFECTS = {  # recording: first planted block
    "swiglu": 3,
    "gelu": 2,
    "moving": 2,
    "registers": 1,
    "native": 1,
    "offset_no_antialias": 1,
}


@functools.cache
def planted_forecast(seed):
    made = planted.planted_model(seed)
    return forecast.forecast(made.config, made.params)


def repaired(seed):
    """The planted model and its params after a few dozen steps of two images."""
    made, settings = planted.planted_model(seed), config_files.load("tiny.py")
    options = inputs.repair_options(settings)
    directions = np.float32(planted_forecast(seed).directions)
    frozen, state = repair.init(made.config, made.params, options, directions)
    step = repair.make_step(made.config, options)
    photographs = [photos.prepared(file, 224) for file in listing.sample_images()[::2]]
    pairs = [np.stack(photographs[:2]), np.stack(photographs[2:])]
    for number in range(44):
        state, metrics = step(state, frozen, pairs[number % 2])
    assert (np.asarray(metrics.layer) == -1).all()
    return made, repair.merged_params(frozen, state)


def random_params(config, gain, seed=0):
    """Kernels that keep a token's size, and a LayerScale of `gain`."""
    rng = np.random.default_rng(seed)
    values = {}
    for path, leaf in param_tree.flatten(param_tree.shapes(config)).items():
        values[path] = np.zeros(leaf.shape, np.float32)
        if path.endswith("kernel"):
            size = leaf.shape[-2] ** -0.5
            values[path] = rng.normal(0, size, leaf.shape).astype(np.float32)
        elif path.endswith("gamma"):
            values[path] += np.float32(gain)
        elif path.endswith("scale"):
            values[path] += 1
    return param_tree.unflatten(values)


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(forecast)
    assert result.attempted >= 7 and result.failed == 0


# --- Where ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_planted_block_and_direction_are_forecast(seed):
    made, found = planted.planted_model(seed), planted_forecast(seed)
    assert found.has_defect and found.block == made.block == planted.BLOCK
    assert found.stretches == (forecast.Stretch(made.block, made.config.depth - 1),)
    cosine = np.abs(found.directions[made.block :] @ made.direction)
    assert (cosine > np.cos(np.radians(15))).all()
    assert found.growth.argmax() == made.block and found.growth[made.block] > 10
    assert found.turns[made.block :].max() < 10 and found.turns[-1] == 0
    assert found.turns[made.block - 1] > 80


@pytest.mark.parametrize("name", DEFECTS)
def test_the_first_defect_of_every_recording_is_forecast(name):
    config, params = recorded_model(name)
    found = forecast.forecast(config, params)
    assert found.has_defect and found.block == DEFECTS[name]
    assert found.blamed[0].block == DEFECTS[name]
    assert found.blamed[0].kernel == (
        "mlp/w3" if name in ("swiglu", "moving") else "mlp/fc2"
    )


def test_several_defects_of_a_model_are_told_apart():
    config, params = recorded_model("moving")
    found = forecast.forecast(config, params)
    assert [run.first for run in found.stretches] == [2, 5, 8]
    assert "stand out from block 5, 8 on" in found.verdict


@pytest.mark.parametrize("name", ["swiglu", "gelu", "moving"])
def test_directions_and_gaps_are_those_of_the_defects(name):
    config, params = recorded_model(name)
    found = forecast.forecast(config, params)
    expected = defects.singular_defects(config, params)
    cosine = np.sum(found.directions * np.asarray(expected.directions), axis=1)
    assert (np.abs(cosine) > 1 - 1e-6).all()  # float32 there
    np.testing.assert_allclose(found.gaps, expected.gaps, rtol=1e-6)
    ratios = found.gaps / np.append(1.0, found.gaps[:-1])
    np.testing.assert_allclose(found.growth, ratios)
    np.testing.assert_allclose(np.linalg.norm(found.directions, axis=1), 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_planted_unit_nothing_is_forecast(seed):
    made = planted.planted_model(seed)
    made.params["blocks"]["mlp"]["w3"]["kernel"][made.block, 0] = 0
    found = forecast.forecast(made.config, made.params)
    assert not found.has_defect and found.block == -1
    assert found.stretches == () and found.blamed == () and np.isnan(found.gain)
    assert found.gaps.max() < 1.1  # far from the threshold of 3
    assert found.verdict.startswith("No singular defect is forecast")


@pytest.mark.parametrize("gain", [1e-5, 0.3, 1.0])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_nothing_is_forecast_for_random_models(name, gain):
    config = SMALL_MODELS[name]
    for seed in range(2):
        found = forecast.forecast(config, random_params(config, gain, seed))
        assert not found.has_defect, found.gaps
        assert found.gaps.max() < 2.5


@pytest.mark.slow
def test_after_the_repair_the_verdict_changes_and_the_blamed_values_are_smaller():
    made, params = repaired(seed=1)
    before, after = planted_forecast(1), forecast.forecast(made.config, params)
    assert before.has_defect and not after.has_defect
    assert before.verdict != after.verdict
    spectrum = spectra.kernel_spectra(made.config, params)
    changes = spectra.singular_value_changes(made.config, made.params, params)
    guilty = [triplet for triplet in before.blamed if triplet.share > 0.5]
    assert {triplet.kernel for triplet in guilty} == {"mlp/w12", "mlp/w3"}
    for triplet in guilty:
        now = spectrum[triplet.kernel][triplet.block, 0]
        assert now < 0.9 * triplet.singular_value
        change = changes[triplet.kernel][triplet.block]
        assert change[triplet.index] < -0.1 * triplet.singular_value
        # Its neighbors in the spectrum are left alone.
        assert np.abs(change[1:]).max() < 0.1 * abs(change[0])


def test_jax_arrays_and_another_count_of_cores_give_the_same(monkeypatch):
    config, params = recorded_model("registers")
    one = forecast.forecast(config, params)
    monkeypatch.setattr(linalg.os, "cpu_count", lambda: 5)
    other = forecast.forecast(config, jax.device_put(params))
    np.testing.assert_array_equal(one.directions, other.directions)
    assert one.blamed == other.blamed and one.verdict == other.verdict


def test_progress_counts_the_blocks():
    config, params = recorded_model("moving")
    told = []
    forecast.forecast(config, params, progress=lambda *at: told.append(at))
    assert told == [(done, 10) for done in range(1, 11)]  # more than are done at once


# --- Which stretch --------------------------------------------------------------------


def stretches(gaps, turns):
    found = forecast.stretches(np.array(gaps, float), np.array(turns, float))
    return [tuple(run) for run in found]


def test_stretches_end_with_the_gap_or_a_turn():
    assert stretches([1, 2, 2.9], [0, 0, 0]) == []
    assert stretches([3, 1, 3], [0, 0, 0]) == [(0, 0), (2, 2)]
    assert stretches([9, 9, 9, 9], [45, 46, 0, 0]) == [(0, 1), (2, 3)]
    assert stretches([1, 9, 9, 1], [90, 10, 90, 0]) == [(1, 2)]


# --- Who is to blame ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiglu", "gelu", "registers"])
def test_hidden_slopes_rebuild_the_linear_fit(name):
    config, params = recorded_model(name)
    model = reference_model(name)
    first = "mlp/fc1" if config.ffn_layer == "mlp" else "mlp/w12"
    weight = kernels.matrix(config, params, 1, first)
    layer = params["blocks"]["mlp"][first.removeprefix("mlp/")]
    slopes = defects.hidden_slopes(
        config.ffn_layer, weight, np.float64(layer["bias"][1])
    )
    parts = np.split(weight, len(slopes))
    fit = sum(slope[:, None] * part for slope, part in zip(slopes, parts, strict=True))
    assert relative(fit, reference.hidden_fit(model, 1)) < 1e-12


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_the_gain_is_what_the_block_does_to_its_trigger(name):
    config, params = recorded_model(name)
    model = reference_model(name)
    nu = forecast.forecast(config, params).directions[2]
    gain, _ = forecast.blame(config, params, 2, nu)
    matrix = reference.block_map(model, 2)
    np.testing.assert_allclose(gain, np.linalg.norm(matrix.T @ nu), rtol=1e-10)


def all_shares(config, params, block, nu):
    """Every triplet's share, by kernel and index."""
    gain, found = forecast.blame(config, params, block, nu, count=10**6)
    sizes = {
        name: len(s[0]) for name, s in spectra.kernel_spectra(config, params).items()
    }
    shares = {}
    for triplet in found:
        assert triplet.block == block
        shares[triplet.kernel, triplet.index] = triplet.share
    expected = sum(sizes[name] for name, _ in {(n, 0) for n, _ in shares})
    assert len(shares) == len(found) == expected
    return gain, shares


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_a_share_is_what_is_missing_without_the_triplet(name):
    """Exactly for v, proj and the last kernel: the map is linear in each of them."""
    config, params = recorded_model(name)
    block = DEFECTS[name]
    nu = forecast.forecast(config, params).directions[block]
    gain, shares = all_shares(config, params, block, nu)
    matrix = defects.block_map(config, params, block)
    trigger = matrix.T @ nu / gain
    last = "mlp/fc2" if name == "gelu" else "mlp/w3"
    for kernel, index in ((last, 0), (last, 3), ("attn/v", 0), ("attn/proj", 1)):
        u, s, vt = np.linalg.svd(kernels.matrix(config, params, block, kernel))
        missing = s[index] * np.outer(vt[index], u[:, index])
        path = "attn/qkv" if kernel == "attn/v" else kernel
        flat = param_tree.flatten(params)
        stack = np.float64(flat[f"blocks/{path}/kernel"])
        columns = slice(-missing.shape[1], None)
        stack[block][:, columns] -= missing
        changed = param_tree.unflatten(flat | {f"blocks/{path}/kernel": stack})
        without = nu @ defects.block_map(config, changed, block) @ trigger
        # The factors behind the shares are rounded to float32.
        np.testing.assert_allclose(
            (gain - without) / gain, shares[kernel, index], atol=1e-6
        )


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_kernels_in_a_row_carry_the_same_and_paths_add_up_to_the_gain(name):
    config, params = recorded_model(name)
    block = DEFECTS[name]
    nu = forecast.forecast(config, params).directions[block]
    gain, shares = all_shares(config, params, block, nu)
    sums = {}
    for (kernel, _), share in shares.items():
        sums[kernel] = sums.get(kernel, 0.0) + share
    v, proj, first, last = (sums[kernel] for kernel in kernels.names(config))
    np.testing.assert_allclose(v, proj, atol=1e-5)
    np.testing.assert_allclose(first, last, atol=1e-5)
    # What neither passes through attention nor through the FFN is the residual.
    matrix = defects.block_map(config, params, block)
    attention = defects.attention_map(kernels.weights(config, params, block))
    trigger = matrix.T @ nu / gain
    ffn = nu @ (matrix - attention) @ trigger / gain
    np.testing.assert_allclose(last, ffn, atol=1e-5)
    both = defects.ffn_map(kernels.weights(config, params, block))
    through = nu @ both @ (attention - np.eye(config.embed_dim)) @ trigger / gain
    np.testing.assert_allclose(v, through, atol=1e-5)


def test_blame_is_sorted_cut_and_of_this_block_alone():
    config, params = recorded_model("swiglu")
    nu = forecast.forecast(config, params).directions[3]
    _, found = forecast.blame(config, params, 3, nu, count=4)
    _, everything = forecast.blame(config, params, 3, nu, count=10**6)
    assert len(found) == 4 and found == everything[:4]
    sizes = [abs(triplet.share) for triplet in everything]
    assert sizes == sorted(sizes, reverse=True)
    spectrum = spectra.kernel_spectra(config, params)
    for triplet in found:
        value = spectrum[triplet.kernel][3, triplet.index]
        np.testing.assert_allclose(triplet.singular_value, value, rtol=1e-6)
    for block in (-1, config.depth):
        message = error_of(forecast.blame, config, params, block, nu)
        assert f"there is no block {block}: blocks are 0 to 7" in message
