"""spectra.py: against NumPy, by identities, and on the planted model."""

import doctest

import jax
import numpy as np
import pytest

import reference
from recorded import recorded_model, reference_model
from samples import SMALL, error_of, random_params
from sinder_jax import defects, factor, kernels, planted
from sinder_jax.analysis import spectra


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(spectra)
    assert result.attempted >= 12 and result.failed == 0


# --- Kernels --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_kernel_spectra_match_an_svd(name):
    config, params = SMALL[name], random_params(SMALL[name])
    found = spectra.kernel_spectra(config, params)
    first, last = ("w12", "w3") if config.ffn_layer == "swiglu" else ("fc1", "fc2")
    qkv = np.split(np.float64(params["blocks"]["attn"]["qkv"]["kernel"]), 3, axis=-1)
    kernels = dict(zip(("attn/q", "attn/k", "attn/v"), qkv, strict=True)) | {
        "attn/proj": params["blocks"]["attn"]["proj"]["kernel"],
        f"mlp/{first}": params["blocks"]["mlp"][first]["kernel"],
        f"mlp/{last}": params["blocks"]["mlp"][last]["kernel"],
    }
    assert set(found) == set(kernels)
    for kernel, stack in kernels.items():
        expected = np.linalg.svd(np.float64(stack), compute_uv=False)
        assert found[kernel].dtype == np.float64
        # What a Gram matrix may lose, see `linalg.GRAM_IS_ENOUGH`.
        np.testing.assert_allclose(found[kernel], expected, rtol=2e-8)


def test_kernel_spectra_of_missing_ranks_are_exact():
    config, params = SMALL["swiglu"], random_params(SMALL["swiglu"])
    kernel = params["blocks"]["mlp"]["w3"]["kernel"]
    kernel[0, 3:] = 0
    kernel[1] = 0
    found = spectra.kernel_spectra(config, params)["mlp/w3"]
    expected = np.linalg.svd(np.float64(kernel), compute_uv=False)
    np.testing.assert_allclose(found, expected, atol=1e-13 * expected.max())
    assert (found[0, 3:] < 1e-13).all() and not found[1].any()


# --- Block maps -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiglu", "gelu", "registers"])
def test_block_maps_match_the_svd_of_the_reference(name):
    config, params = recorded_model(name)
    model = reference_model(name)
    maps = spectra.block_maps(config, params)
    for block in range(config.depth):
        matrix = reference.block_map(model, block)
        u, s, vh = np.linalg.svd(matrix)
        np.testing.assert_allclose(maps.singular_values[block], s, rtol=1e-10)
        np.testing.assert_allclose(maps.ratios[block], s[0] / s[1], rtol=1e-10)
        # Up to the sign; 1e-14 over the smallest gap there is, 1e-2.
        assert abs(maps.directions[block] @ u[:, 0]) > 1 - 1e-10
        assert abs(maps.triggers[block] @ vh[0]) > 1 - 1e-10
        thrown = matrix @ maps.triggers[block]
        np.testing.assert_allclose(thrown, s[0] * maps.directions[block], atol=1e-9)


def test_eigenvalues_have_the_trace_the_determinant_and_the_order():
    config, params = recorded_model("swiglu")
    model = reference_model("swiglu")
    found = spectra.block_maps(config, params).eigenvalues
    assert found.dtype == np.complex128
    assert found.shape == (config.depth, config.embed_dim)
    assert (np.diff(np.abs(found)) <= 1e-12).all()
    for values, block in zip(found, range(config.depth), strict=True):
        matrix = reference.block_map(model, block)
        np.testing.assert_allclose(values.sum(), np.trace(matrix), rtol=1e-10)
        log_determinant = np.linalg.slogdet(matrix)[1]
        np.testing.assert_allclose(np.log(np.abs(values)).sum(), log_determinant)


def test_eigenvalues_are_left_out_on_request():
    config, params = recorded_model("gelu")
    maps = spectra.block_maps(config, params, eigenvalues=False)
    assert maps.eigenvalues.shape == (config.depth, 0)
    with_them = spectra.block_maps(config, params)
    np.testing.assert_array_equal(maps.directions, with_them.directions)


def test_planted_trigger_and_direction_are_the_leading_vectors_of_its_block():
    made = planted.planted_model(3)
    trigger = made.params["blocks"]["mlp"]["w12"]["kernel"][made.block, :, 0]
    maps = spectra.block_maps(made.config, made.params, eigenvalues=False)
    assert abs(maps.directions[made.block] @ made.direction) > 0.99
    assert abs(maps.triggers[made.block] @ trigger) > 0.99 * planted.GATE
    # Another block knows neither.
    assert abs(maps.directions[made.block - 1] @ made.direction) < 0.5
    ratios = np.delete(maps.ratios, made.block)
    assert ratios.max() < 1.1 < 10 < maps.ratios[made.block]


def test_probes_give_nearly_the_analytic_maps_and_need_a_key():
    config, params = recorded_model("gelu")
    exact = spectra.block_maps(config, params, eigenvalues=False)
    probed = [
        spectra.block_maps(
            config,
            params,
            method="monte_carlo",
            key=jax.random.key(seed),
            num_probes=20_000,
            eigenvalues=False,
        )
        for seed in (0, 1)
    ]
    for one in probed:  # 1/√20,000 = 0.7 %
        np.testing.assert_allclose(one.ratios, exact.ratios, rtol=0.05)
    assert (probed[0].ratios != probed[1].ratios).all()
    assert "method must be" in error_of(spectra.block_maps, config, params, method="x")


def test_decay_counts_by_hand():
    # Rotations by 120°, of length 0.9 and 1.1: real parts -0.45 and -0.55.
    turn = np.exp(2j * np.pi / 3)
    found = spectra.decay(
        np.array(
            [
                [1.1 * turn, 1.1 / turn, 0.9 * turn, 0.9 / turn],
                [3.0, 2.0, 1.0, 0.5],  # |λ| = 1 is not inside
            ],
            np.complex128,
        )
    )
    np.testing.assert_array_equal(found.share_inside, [0.5, 0.25])
    np.testing.assert_array_equal(found.share_negative, [1.0, 0.0])
    np.testing.assert_allclose(found.most_negative, [-0.55, 0.5])


# --- What a repair changed ------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_changes_are_epsilon_also_where_it_reorders_singular_values(name):
    config, params = recorded_model(name)
    factors = factor.factorize(config, params)
    rng = np.random.default_rng(0)
    eps = {
        kernel: rng.normal(0, 0.5, sigma.shape).astype(np.float32)
        for kernel, sigma in factors.sigma.items()
    }
    repaired = factor.merge(params, factors, eps)
    changes = spectra.singular_value_changes(config, params, repaired, 4)
    assert list(changes) == list(kernels.names(config))
    for kernel, found in changes.items():
        assert found.shape == (config.depth, 4)
        # Rounding to float32, over the smallest relative gap of σ², about 1e-3.
        np.testing.assert_allclose(found, eps[kernel][:, :4], atol=1e-3)
    same = spectra.singular_value_changes(config, params, params)
    assert all(found.shape[1] == 3 and not found.any() for found in same.values())


def test_changes_between_models_that_differ_raise():
    config, params = recorded_model("swiglu")
    wide = random_params(SMALL["mlp"])
    wide["blocks"]["mlp"] = {"w12": {"kernel": np.ones((3, 128, 8))}}
    message = error_of(spectra.singular_value_changes, config, params, wide)
    assert "the models differ: attn/v is (64, 64) in one and (128, 128)" in message
    message = error_of(spectra.singular_value_changes, config, params, params, 65)
    assert "not 65" in message


# --- Any arrays, and progress ---------------------------------------------------------


def test_jax_arrays_give_what_numpy_arrays_give():
    config, params = recorded_model("registers")
    placed = jax.device_put(params)
    for function in (
        spectra.kernel_spectra,
        lambda *args: spectra.block_maps(*args)._asdict(),
        lambda *args: spectra.singular_value_changes(*args, args[1]),
    ):
        ours, theirs = function(config, placed), function(config, params)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_progress_is_told_after_every_piece():
    config, params = recorded_model("gelu")
    for call, total in (
        (spectra.kernel_spectra, 6 * config.depth),
        (spectra.block_maps, config.depth),
    ):
        told = []
        call(config, params, progress=lambda *at, told=told: told.append(at))
        assert told == [(done, total) for done in range(1, total + 1)]


def test_defects_and_spectra_agree_on_the_first_block():
    """Where the running product is the block's map."""
    config, params = recorded_model("moving")
    maps = spectra.block_maps(config, params, eigenvalues=False)
    found = defects.singular_defects(config, params)
    assert abs(maps.directions[0] @ np.asarray(found.directions[0])) > 1 - 1e-6
    np.testing.assert_allclose(maps.ratios[0], found.gaps[0], rtol=1e-9)
