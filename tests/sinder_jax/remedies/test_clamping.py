"""clamping.py: against NumPy, by identities, and on the planted model."""

import doctest
import functools

import jax
import numpy as np
import pytest
import scipy.linalg

import convert
import photos
import reference
from recorded import recorded_model, reference_model
from samples import error_of, relative
from sinder_jax import planted
from sinder_jax.analysis import spectra
from sinder_jax.analysis.defective import norm_ratio
from sinder_jax.analysis.tokens import last_patches, token_norms
from sinder_jax.data import listing
from sinder_jax.remedies import clamping

GAMMAS = (2.0, 1.5, 1.3)  # of figure 5


def leaves(params):
    return jax.tree_util.tree_leaves_with_path(params)


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(clamping)
    assert result.attempted >= 4 and result.failed == 0


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_clamped_kernels_match_the_reference(name, gamma):
    config, params = recorded_model(name)
    model = reference_model(name)
    ours = convert.to_torch(
        config, clamping.clamp_singular_values(config, params, gamma)
    )
    clamped = reference.clamp(model, gamma)
    changed = 0
    for key, expected in clamped.state.items():
        np.testing.assert_allclose(ours[key], expected, atol=1e-6, err_msg=key)
        if not np.array_equal(expected, model.state[key]) and ".weight" in key:
            assert relative(ours[key], expected) < 1e-6
            changed += relative(model.state[key], expected) > 1e-3
    assert changed > config.depth  # the control: something was clamped


def test_no_singular_value_is_above_gamma_and_the_others_stay():
    config, params = recorded_model("swiglu")
    before = spectra.kernel_spectra(config, params)
    after = spectra.kernel_spectra(
        config, clamping.clamp_singular_values(config, params, 1.2, kernels=["mlp/w3"])
    )
    expected = np.minimum(before["mlp/w3"], 1.2)
    np.testing.assert_allclose(after["mlp/w3"], expected, atol=1e-6)
    for name in before.keys() - {"mlp/w3"}:
        np.testing.assert_array_equal(after[name], before[name])


def test_what_is_not_clamped_keeps_its_bits_and_the_input_is_untouched():
    config, params = recorded_model("gelu")
    kept = jax.tree.map(np.copy, params)
    clamped = clamping.clamp_singular_values(config, params, 1.0, kernels=["attn/v"])
    for (path, got), (_, want) in zip(leaves(clamped), leaves(kept), strict=True):
        assert got.dtype == want.dtype
        if "qkv" in str(path) and "kernel" in str(path):
            width = config.embed_dim
            np.testing.assert_array_equal(got[..., : 2 * width], want[..., : 2 * width])
            assert not np.array_equal(got[..., 2 * width :], want[..., 2 * width :])
        else:
            np.testing.assert_array_equal(got, want)
    nothing = clamping.clamp_singular_values(config, params, 1e3)
    for (path, got), (_, want), (_, now) in zip(
        leaves(nothing), leaves(kept), leaves(params), strict=True
    ):
        np.testing.assert_array_equal(got, want, err_msg=str(path))
        np.testing.assert_array_equal(now, want, err_msg=str(path))


def test_several_gammas_factorize_once_and_give_what_each_gives_alone(monkeypatch):
    config, params = recorded_model("swiglu")
    calls = []

    def counted(matrix, **subset):
        calls.append(matrix.shape)
        return eigh(matrix, **subset)

    eigh = scipy.linalg.eigh
    monkeypatch.setattr(scipy.linalg, "eigh", counted)
    several = clamping.clamp_all(config, params, (1.3, 2.0, 1.5))
    assert not calls  # nothing is computed before the first is asked for
    found = {}
    for gamma, clamped in several:
        found[gamma] = clamped
        assert len(calls) == 4 * config.depth
    assert list(found) == [1.3, 2.0, 1.5]
    for gamma, clamped in found.items():
        alone = clamping.clamp_singular_values(config, params, gamma)
        for (path, got), (_, want) in zip(leaves(clamped), leaves(alone), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=str(path))
    assert list(clamping.clamp_all(config, params, ())) == []


def test_clamping_lowers_the_norm_ratio_monotonically():
    made = planted.planted_model(1)
    pixels = photos.prepared(listing.sample_images()[0], 224)

    def ratio(params):
        tokens = last_patches(made.config, jax.device_put(params), pixels)
        return float(norm_ratio(token_norms(tokens)))

    gammas = (20.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.3)  # 9 are planted
    clamped = clamping.clamp_all(made.config, made.params, gammas)
    ratios = [ratio(params) for _, params in clamped]
    assert ratios[0] == ratio(made.params) > 10
    # Until the thrown tokens are no longer the longest ones; then the ratio is that
    # of sound tokens, 1.3 to 1.4, which clamping moves either way.
    assert (np.diff(ratios[:6]) < -0.05).all(), ratios
    assert max(ratios[5:]) < 1.5, ratios


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_a_gamma_that_is_not_positive_raises_at_once(gamma):
    config, params = recorded_model("gelu")
    for call in (
        lambda: clamping.clamp_singular_values(config, params, gamma),
        lambda: clamping.clamp_all(config, params, (2.0, gamma)),
    ):
        assert f"gamma must be above 0, got {gamma}" in error_of(call)


def test_kernels_that_do_not_exist_or_come_twice_raise():
    config, params = recorded_model("gelu")
    clamp = functools.partial(clamping.clamp_all, config, params, [1.0])
    assert "no kernel 'mlp/w12'" in error_of(clamp, kernels=["mlp/w12"])
    for names in (["attn/v", "attn/v"], ["attn/qkv", "attn/k"]):
        assert "named twice" in error_of(clamp, kernels=names)


def test_jax_arrays_give_what_numpy_arrays_give():
    config, params = recorded_model("registers")
    ours, theirs = (
        clamping.clamp_singular_values(config, x, 1.3)
        for x in (jax.device_put(params), params)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_progress_is_told_after_every_kernel():
    config, params = recorded_model("gelu")
    told, total = [], 4 * config.depth
    clamping.clamp_singular_values(
        config, params, 2.0, progress=lambda *at: told.append(at)
    )
    assert told == [(done, total) for done in range(1, total + 1)]
