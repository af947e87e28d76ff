"""ablation.py: nothing is written along the throw, and nothing else changes."""

import doctest
import functools

import jax
import numpy as np
import pytest

import photos
from sinder_jax import defects, kernels, param_tree, planted
from sinder_jax.analysis.defective import large_norms
from sinder_jax.analysis.forecast import Blame, forecast
from sinder_jax.analysis.tokens import cosine, last_patches, token_norms
from sinder_jax.data import listing
from sinder_jax.remedies import ablation

SEEDS = range(12)


@functools.cache
def model(seed=0):
    return planted.planted_model(seed)


@functools.cache
def found(seed=0):
    return forecast(model(seed).config, model(seed).params)


@functools.cache
def ablated(seed=0):
    return ablation.ablate(model(seed).config, model(seed).params, found=found(seed))


def without_the_unit(seed):
    params = jax.tree.map(np.copy, model(seed).params)
    params["blocks"]["mlp"]["w3"]["kernel"][model(seed).block, model(seed).unit] = 0
    return params


def written(params, block, name="w3", scale="ls2"):
    """What a layer can add to a token: its rows and its bias, times γ; float64."""
    layer = param_tree.flatten(params["blocks"])
    layer = {k: np.float64(v[block]) for k, v in layer.items() if f"{name}/" in k}
    kernel, bias = (next(v for k, v in layer.items() if x in k) for x in ("ke", "bi"))
    rows = np.concatenate([kernel, bias[None]])
    return rows * params["blocks"][scale]["gamma"][block]


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(ablation)
    assert result.attempted >= 4 and result.failed == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_it_brings_back_the_tokens_of_the_model_without_the_unit(seed):
    made = model(seed)
    image = photos.prepared(listing.sample_images()[seed % 8], made.config.img_size)
    truth, before, after = (
        last_patches(made.config, jax.device_put(params), image)
        for params in (without_the_unit(seed), made.params, ablated(seed))
    )
    flawed = np.asarray(large_norms(token_norms(before)))
    assert flawed.sum() >= 3
    assert not large_norms(token_norms(after)).any()
    assert np.asarray(cosine(truth, before))[flawed].mean() < 0.5
    # Not 1: a token's own part along the line, one of 128, is lost as well.
    assert np.asarray(cosine(truth, after))[flawed].mean() > 0.97
    assert np.asarray(cosine(truth, after))[~flawed].mean() > 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_the_line_is_the_planted_one_where_the_direction_leans(seed):
    made = model(seed)
    weights = kernels.weights(made.config, made.params, made.block)
    direction = found(seed).directions[made.block]
    line = ablation.thrown(weights, direction, in_ffn=True)
    angles = [np.degrees(np.arccos(abs(x @ made.direction))) for x in (line, direction)]
    assert angles[0] < 1 < 3 < angles[1]  # measured: 0.7 at most, and 3.4 at least


def test_all_that_is_written_along_the_line_goes_and_nothing_across():
    made = model()
    weights = kernels.weights(made.config, made.params, made.block)
    direction = found().directions[made.block]
    line = ablation.thrown(weights, direction, in_ffn=True)
    before, after = (written(x, made.block) for x in (made.params, ablated()))
    assert np.abs(before @ line).max() > 8  # the planted column
    np.testing.assert_allclose(after @ line, 0, atol=1e-6)  # float32's rounding of 9
    across = np.eye(len(line)) - np.outer(line, line)
    np.testing.assert_allclose(after, before @ across, atol=1e-6)


def test_only_one_layer_of_one_block_changes_and_the_input_is_untouched():
    made, kept = model(), jax.tree.map(np.copy, model().params)
    after = param_tree.flatten(ablation.ablate(made.config, made.params))
    before = param_tree.flatten(made.params)
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert changed == {"blocks/mlp/w3/kernel"}  # the planted model has no biases
    differ = np.any(before["blocks/mlp/w3/kernel"] != after["blocks/mlp/w3/kernel"], 2)
    assert np.flatnonzero(differ.any(axis=1)).tolist() == [made.block]
    assert all(leaf.dtype == np.float32 for leaf in after.values())
    jax.tree.map(np.testing.assert_array_equal, made.params, kept)


def test_a_bias_loses_its_part_and_a_closed_channel_keeps_its_weights():
    made = model()
    params = jax.tree.map(np.copy, made.params)
    rng = np.random.default_rng(0)
    mlp, block = params["blocks"]["mlp"]["w3"], made.block
    mlp["bias"][block] = rng.normal(size=made.config.embed_dim)
    gamma = params["blocks"]["ls2"]["gamma"][block]
    gamma[:] = rng.uniform(0.5, 2, len(gamma))
    gamma[[3, 60]] = 0.0
    after = ablation.ablate(made.config, params)
    kernel, bias = (after["blocks"]["mlp"]["w3"][x][block] for x in ("kernel", "bias"))
    assert np.array_equal(kernel[:, [3, 60]], mlp["kernel"][block][:, [3, 60]])
    assert np.array_equal(bias[[3, 60]], mlp["bias"][block][[3, 60]])
    gap = written(params, block) - written(after, block)
    _, size, lines = np.linalg.svd(gap)
    # One line was taken out of rows and bias alike, and nothing of it is left.
    assert size[0] > 1 and size[1] < 1e-5
    np.testing.assert_allclose(written(after, block) @ lines[0], 0, atol=1e-5)
    assert np.abs(gap[-1]).max() > 1e-2


def test_the_half_to_blame_may_be_attention():
    """The same block, told that its attention throws."""
    made = model()
    told = found()._replace(blamed=(Blame(made.block, "attn/v", 0, 1.0, 1.0),))
    after = ablation.ablate(made.config, made.params, found=told)
    weights = kernels.weights(made.config, made.params, made.block)
    direction = told.directions[made.block]
    line = ablation.thrown(weights, direction, in_ffn=False)
    through = defects.attention_map(weights) - np.eye(len(line))
    answer = through @ defects.block_map(made.config, made.params, made.block).T
    assert abs(line @ (answer @ direction)) > 0.999 * np.linalg.norm(answer @ direction)
    got = written(after, made.block, "proj", "ls1")
    assert np.abs(written(made.params, made.block, "proj", "ls1") @ line).max() > 1e-2
    np.testing.assert_allclose(got @ line, 0, atol=1e-7)
    changed = jax.tree.map(np.array_equal, after["blocks"], made.params["blocks"])
    assert changed["mlp"]["w3"]["kernel"] and not changed["attn"]["proj"]["kernel"]


def test_a_model_without_a_defect_comes_back_bit_for_bit():
    params = without_the_unit(0)
    after = ablation.ablate(model().config, params)
    jax.tree.map(np.testing.assert_array_equal, after, params)
