"""The delta between two models: what `extract` finds, and what it refuses."""

import functools

import jax
import numpy as np
import pytest
import scipy.linalg

import convert
import golden
from deltas import (
    MLP,
    REGISTERS,
    SWIGLU,
    assert_same_delta,
    changed_copy,
    every_model,
    extracted,
    kernels_of,
    next_number,
    random_delta,
    random_eps,
    random_model,
)
from samples import relative
from sinder_jax import delta, difference, factor, param_tree


@every_model
def test_extracted_eps_is_the_eps_of_the_run(config):
    params, _, found, _ = extracted(config)
    _, factors = random_model(config)
    eps = random_eps(factors)
    assert (
        found.base
        == random_delta(config).base
        == param_tree.digest(param_tree.flatten(params))
    )
    for name, e in eps.items():
        sigma = factors.sigma[name]
        # the run rounded σ + ε once; each float32 product of the kernel, projected,
        # leaves 6e-8 of the largest singular value (measured)
        lost = np.spacing(sigma + e) / 2 + 3e-7 * sigma[:, :1]
        assert np.all(np.abs(found.eps[name] - e) <= lost), name
        assert not found.eps[name][[0, 3]].any()
        # the probe is relative to ε, which in block 4 is known to 1e-6
        np.testing.assert_allclose(
            found.probe[name][4], random_delta(config).probe[name][4], atol=2e-5
        )


def test_projection_minds_that_float32_factors_are_not_quite_orthonormal():
    _, factors = random_model(SWIGLU)
    u, sigma, v = (part["mlp/w3"][4] for part in (factors.u, factors.sigma, factors.v))
    kernel = (np.float64(v) * sigma) @ np.float64(u).T
    # off the diagonal the factors' rounding enters twice, 16 times (6e-8)²
    np.testing.assert_allclose(
        difference._nearest_values(kernel, u, v), sigma, rtol=0, atol=1e-13 * sigma[0]
    )
    # the control: lengths of 1 + 1e-7 do matter
    plain = np.einsum("is,io,os->s", np.float64(v), kernel, np.float64(u))
    assert np.abs(plain - sigma).max() > 1e-8 * sigma[0]


def test_the_smallest_change_is_kept():
    """The last bit of one singular value, far below the tolerance for rounding."""
    params, factors = random_model(MLP)
    eps = jax.tree.map(np.zeros_like, factors.sigma)
    eps["mlp/fc1"][1, 0] = np.spacing(factors.sigma["mlp/fc1"][1, 0])
    repaired = factor.merge(params, factors, eps)
    found, report = difference.extract(MLP, params, repaired)
    assert found.eps["mlp/fc1"][1, 0] == eps["mlp/fc1"][1, 0]
    assert "mlp/fc1 of block 1" in report.rounding_only


def test_kernels_without_rank_or_scale():
    """A zero kernel has no norm to compare with; -0.0 has other bits than 0.0."""

    def zero(leaf):
        leaf[1], leaf[2] = 0, 0

    params = changed_copy(random_model(MLP)[0], "blocks/attn/proj/kernel", zero)
    factors = factor.factorize(MLP, params)
    repaired = factor.merge(params, factors, random_eps(factors, (0, 0.1, 0, 0, 0)))
    repaired["blocks"]["attn"]["proj"]["kernel"][2] = -0.0
    found, report = difference.extract(MLP, params, repaired)
    assert report.differences["attn/proj of block 2"] == (0, 0)
    got = delta.apply(params, found)["blocks"]["attn"]["proj"]["kernel"][1]
    # as in any other kernel: float32 sums
    assert relative(got, repaired["blocks"]["attn"]["proj"]["kernel"][1]) < 1e-6


def test_progress_names_each_kernel_that_is_factorized():
    params, repaired, _, report = extracted(MLP)
    calls = []
    difference.extract(
        MLP,
        params,
        repaired,
        before_svd=lambda name, block: calls.append((name, block)),
    )
    assert [f"{name} of block {block}" for name, block in calls] == list(
        report.differences
    )


# --- The authors' files ---------------------------------------------------------------


@functools.cache
def recorded_repair(name):
    """(config, params, repaired params) as the authors' code wrote them."""
    arrays, meta = golden.load(name)
    heads = meta["num_heads"]
    config, params = convert.from_torch(golden.state(arrays), num_heads=heads)
    _, repaired = convert.from_torch(golden.state(arrays, "merged"), num_heads=heads)
    return config, params, repaired


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_the_authors_file_gives_a_delta(name):
    config, params, repaired = recorded_repair(name)
    found, report = difference.extract(config, params, repaired)
    applied = kernels_of(config, delta.apply(params, found))
    for key, kernel in kernels_of(config, repaired).items():
        # theirs is a float32 SVD, which turns close pairs: 1.9e-6 measured
        assert relative(applied[key], kernel) < 5e-6, key
    assert report.largest_rest[1] < 5e-6
    # they rebuilt every layer: q, k, the biases and the blocks that were not repaired
    arrays, meta = golden.load(name)
    recorded = golden.stacked(arrays, meta, "final_epsilon")
    for block in range(config.depth):
        rest = {f"attn/{part} of block {block}" for part in ("q", "k", "qkv/bias")}
        assert rest <= set(report.rounding_only)
        kernels = {f"{kernel} of block {block}" for kernel in recorded}
        is_repaired = any(eps[block].any() for eps in recorded.values())
        assert (kernels <= set(report.rounding_only)) != is_repaired


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_extracted_eps_matches_the_authors(name):
    arrays, meta = golden.load(name)
    config, params, repaired = recorded_repair(name)
    found, _ = difference.extract(config, params, repaired)
    recorded = golden.stacked(arrays, meta, "final_epsilon")
    sigma = factor.factorize(config, params).sigma
    for kernel, eps in recorded.items():
        # their σ come from a float32 SVD, ours from float64, and the delta holds the
        # difference: 2.1e-6 of the largest measured
        atol = 5e-6 * sigma[kernel][:, :1]
        assert np.all(np.abs(found.eps[kernel] - eps) <= atol), kernel
    # the control: ε is far above this
    assert max(np.abs(eps).max() for eps in recorded.values()) > 1e-2


@pytest.mark.parametrize("driver", ["gesdd", "gesvd"])
def test_a_repair_on_a_float32_svd_gives_a_delta_and_a_report(driver):
    """Close pairs that it turned are a part of the change, left out where allowed."""

    def close_pairs(leaf):
        rng = np.random.default_rng(5)
        v, u = (np.linalg.qr(rng.standard_normal((16, 16)))[0] for _ in range(2))
        leaf[4] = (v * (3 + 3e-4 * np.arange(16))) @ u.T

    path = "blocks/attn/proj/kernel"
    params = changed_copy(random_model(SWIGLU)[0], path, close_pairs)
    eps = random_eps(factor.factorize(SWIGLU, params))["attn/proj"][4]

    def repair(leaf):
        v, sigma, ut = scipy.linalg.svd(leaf[4], lapack_driver=driver)
        leaf[4] = (v * (sigma + eps)) @ ut

    repaired = changed_copy(params, path, repair)
    with pytest.raises(ValueError, match="attn/proj of block 4 by"):
        difference.extract(SWIGLU, params, repaired)
    found, report = difference.extract(SWIGLU, params, repaired, residual=1e-3)
    found_there = report.differences["attn/proj of block 4"]
    # a float32 SVD turns a pair by rounding / gap, here 6e-8 / 1e-4 times a few
    assert difference.ROUNDING < found_there.rest < 5e-3 * found_there.change
    assert report.largest_rest == ("attn/proj of block 4", found_there.rest)
    # the turn enters ε squared; σ as in the authors' recordings
    np.testing.assert_allclose(found.eps["attn/proj"][4], eps, rtol=0, atol=5e-6 * 3)


# --- What is no repair ----------------------------------------------------------------


def random_change(leaf):
    rng = np.random.default_rng(2)
    noise = rng.standard_normal(leaf[4].shape)
    leaf[4] += 1e-3 * np.linalg.norm(leaf[4]) / np.linalg.norm(noise) * noise


OTHER_CHANGES = {
    # path, change, what the message names
    "norm-last-bit": (
        "blocks/norm1/scale",
        next_number,
        "norm1/scale of block 0 by 1e",
    ),
    "final-norm": ("norm/bias", next_number, "norm/bias by"),
    "embedding": ("patch_embed/kernel", next_number, "patch_embed/kernel by"),
    "position": ("pos_embed", lambda x: next_number(x[0, 3:]), "patch positions by"),
    "class-token": ("cls_token", lambda x: x.__iadd__(1), "class token with position"),
    "register": ("register_tokens", next_number, "register_tokens by"),
    "mask-token": ("mask_token", next_number, "mask_token by"),
    "layer-scale": ("blocks/ls2/gamma", random_change, "ls2/gamma of block 4 by 0.001"),
    "bias": ("blocks/mlp/fc1/bias", random_change, "mlp/fc1/bias of block 4 by 0.001"),
    "query": (
        "blocks/attn/qkv/kernel",
        lambda x: random_change(x[..., :16]),
        "attn/q of block 4 by 0.001",
    ),
    "key-first-block": (
        "blocks/attn/qkv/kernel",
        lambda x: random_change(x[:, :, 16:32]),
        "attn/k of block 4 by 0.001",
    ),
    "off-the-basis": (
        "blocks/mlp/fc2/kernel",
        random_change,
        "mlp/fc2 of block 4 by 0.001",
    ),
}


@pytest.mark.parametrize("case", OTHER_CHANGES)
def test_a_change_that_no_eps_makes_is_refused_by_name(case):
    path, change, message = OTHER_CHANGES[case]
    params, repaired, _, _ = extracted(REGISTERS)
    with pytest.raises(ValueError, match=message) as error:
        difference.extract(REGISTERS, params, changed_copy(repaired, path, change))
    assert "\n" not in str(error.value) and str(error.value).count(" by ") == 1


def test_many_changes_are_counted():
    params, repaired, _, _ = extracted(SWIGLU)

    def everything(leaf):
        leaf *= 1.1

    for path in ("blocks/norm1/scale", "blocks/norm2/bias", "blocks/ls1/gamma"):
        repaired = changed_copy(repaired, path, everything)
    with pytest.raises(ValueError, match="and 5 more") as error:
        difference.extract(SWIGLU, params, repaired)
    assert str(error.value).count("by 0.1") == 10


def test_other_changes_are_found_before_the_first_svd():
    params, repaired, _, _ = extracted(SWIGLU)
    repaired = changed_copy(repaired, "norm/bias", next_number)
    with pytest.raises(ValueError, match="norm/bias"):
        difference.extract(
            SWIGLU, params, repaired, before_svd=lambda *_: pytest.fail("SVD")
        )


def test_a_layout_without_mask_token_is_compared_without():
    params, repaired, found, _ = extracted(SWIGLU)
    zero = changed_copy(repaired, "mask_token", lambda leaf: leaf.fill(0))
    with pytest.raises(ValueError, match="mask_token"):
        difference.extract(SWIGLU, params, zero)
    again, _ = difference.extract(SWIGLU, params, zero, compare_mask_token=False)
    assert_same_delta(again, found)
    # nor does it decide which model a delta belongs to
    zero = changed_copy(params, "mask_token", lambda leaf: leaf.fill(0))
    delta.apply(zero, found)


def test_a_class_token_with_its_position_added_is_the_same():
    """As in timm's files of models with registers."""
    params, repaired, found, _ = extracted(REGISTERS)

    def folded(params):
        flat = param_tree.flatten(params)
        flat["cls_token"] = flat["cls_token"] + flat["pos_embed"][:, :1]
        flat["pos_embed"] = flat["pos_embed"].copy()
        flat["pos_embed"][:, :1] = 0
        return param_tree.unflatten(flat)

    assert_same_delta(difference.extract(REGISTERS, params, folded(repaired))[0], found)
    assert_same_delta(difference.extract(REGISTERS, folded(params), repaired)[0], found)
    delta.apply(folded(params), found)


def test_equal_models_have_no_delta():
    params, _ = random_model(SWIGLU)
    with pytest.raises(ValueError, match="do not differ"):
        difference.extract(SWIGLU, params, params)


def test_rounding_outside_the_kernels_alone_has_no_delta():
    params, _ = random_model(SWIGLU)
    rounded = changed_copy(params, "blocks/attn/qkv/kernel", next_number)
    with pytest.raises(ValueError, match="ε is zero throughout"):
        difference.extract(SWIGLU, params, rounded)


@pytest.mark.parametrize("side", ["base", "repaired"])
def test_numbers_that_are_not_finite_are_refused(side):
    params, repaired, _, _ = extracted(SWIGLU)
    models = {"base": params, "repaired": repaired}
    models[side] = changed_copy(
        models[side], "blocks/mlp/w3/kernel", lambda leaf: leaf.fill(np.nan)
    )
    with pytest.raises(ValueError, match="blocks/mlp/w3/kernel.*NaN"):
        difference.extract(SWIGLU, models["base"], models["repaired"])
