"""Deltas: what `extract` finds is what `apply` puts back, and nothing else passes."""

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
    TOUCHED,
    assert_same_bytes,
    assert_same_delta,
    changed_copy,
    every_model,
    extracted,
    kernels_of,
    random_delta,
    random_eps,
    random_model,
    relative,
)
from sinder_jax import delta, factor, kernels, param_tree

# --- Extracting and applying --------------------------------------------------------


@every_model
def test_applying_what_was_extracted_gives_the_repaired_model(config):
    params, repaired, found, report = extracted(config)
    applied = delta.apply(params, found)
    want = kernels_of(config, repaired)
    for key, kernel in kernels_of(config, applied).items():
        # float32 sums of up to 16 products: 1e-7 measured
        assert relative(kernel, want[key]) < 1e-6, key
    assert delta.touched(found) == TOUCHED
    assert report.largest_rest[1] < 1e-6


@every_model
def test_what_no_eps_touches_keeps_its_bits(config):
    params, _, found, _ = extracted(config)
    applied = delta.apply(params, found)
    before = param_tree.flatten(params)
    trained = {"blocks/attn/qkv/kernel"} | {
        f"blocks/{name}/kernel" for name in kernels.names(config)
    }
    for path, leaf in param_tree.flatten(applied).items():
        blocks = [0, 3] if path in trained else slice(None)
        assert leaf[blocks].tobytes() == before[path][blocks].tobytes(), path
    q_and_k = slice(0, 2 * config.embed_dim)
    qkv = applied["blocks"]["attn"]["qkv"]["kernel"][..., q_and_k]
    np.testing.assert_array_equal(qkv, before["blocks/attn/qkv/kernel"][..., q_and_k])
    # the control: the rest of it did change
    for name in trained & before.keys():
        assert (
            param_tree.flatten(applied)[name][4].tobytes() != before[name][4].tobytes()
        )


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
        delta._nearest_values(kernel, u, v), sigma, rtol=0, atol=1e-13 * sigma[0]
    )
    # the control: lengths of 1 + 1e-7 do matter
    plain = np.einsum("is,io,os->s", np.float64(v), kernel, np.float64(u))
    assert np.abs(plain - sigma).max() > 1e-8 * sigma[0]


@every_model
def test_the_delta_of_a_run_gives_its_very_bits(config):
    params, repaired, _, _ = extracted(config)
    assert_same_bytes(delta.apply(params, random_delta(config)), repaired)


def test_a_run_may_hand_over_jax_arrays():
    params, factors = random_model(SWIGLU)
    eps = random_eps(factors)
    arrays = jax.tree.map(jax.numpy.asarray, (params, factors, eps))
    assert_same_delta(delta.from_eps(SWIGLU, *arrays), random_delta(SWIGLU))


@pytest.mark.parametrize("scale", [0.5, 1e-3, 1.0])
def test_scale_is_a_share_of_eps(scale):
    params, factors = random_model(SWIGLU)
    found = random_delta(SWIGLU)
    applied = kernels_of(SWIGLU, delta.apply(params, found, scale))
    before = kernels_of(SWIGLU, params)
    for (name, block), kernel in applied.items():
        if block not in TOUCHED:
            assert kernel.tobytes() == before[name, block].tobytes()
            continue
        u, sigma, v = (
            part[name][block].astype(np.float64)
            for part in (factors.u, factors.sigma, factors.v)
        )
        want = (v * (sigma + scale * found.eps[name][block])) @ u.T
        # float32 sums of 16 products
        assert relative(kernel, want) < 1e-6
        if block == 4 and scale < 1:  # the control: of the whole ε it is far off
            assert relative(kernel, (v * (sigma + found.eps[name][block])) @ u.T) > 1e-2


def test_a_single_eps_rebuilds_the_four_kernels_of_its_block():
    """As `factor.merge` decides, whose bits it must have."""
    params, factors = random_model(SWIGLU)
    eps = jax.tree.map(np.zeros_like, factors.sigma)
    eps["mlp/w3"][2, 3] = 0.01
    found = delta.from_eps(SWIGLU, params, factors, eps)
    assert delta.touched(found) == (2,)
    assert not found.probe["attn/v"].any() and found.probe["mlp/w3"][2].all()
    assert_same_bytes(delta.apply(params, found), factor.merge(params, factors, eps))


def test_the_smallest_change_is_kept():
    """The last bit of one singular value, far below the tolerance for rounding."""
    params, factors = random_model(MLP)
    eps = jax.tree.map(np.zeros_like, factors.sigma)
    eps["mlp/fc1"][1, 0] = np.spacing(factors.sigma["mlp/fc1"][1, 0])
    repaired = factor.merge(params, factors, eps)
    found, report = delta.extract(MLP, params, repaired)
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
    found, report = delta.extract(MLP, params, repaired)
    assert report.differences["attn/proj of block 2"] == (0, 0)
    got = delta.apply(params, found)["blocks"]["attn"]["proj"]["kernel"][1]
    # as in any other kernel: float32 sums
    assert relative(got, repaired["blocks"]["attn"]["proj"]["kernel"][1]) < 1e-6


def test_a_model_is_repaired_leaf_by_leaf():
    params, repaired, found, _ = extracted(SWIGLU)
    whole = param_tree.flatten(delta.apply(params, found))
    calls = []
    for path, leaf in param_tree.flatten(params).items():
        before = leaf.copy()
        got = delta.repaired_leaf(
            found,
            path,
            leaf,
            before_svd=lambda name, block: calls.append((name, block)),
        )
        assert got.tobytes() == whole[path].tobytes(), path
        assert leaf.tobytes() == before.tobytes(), path
    wanted = {(n, b) for n in kernels.names(SWIGLU) for b in TOUCHED}
    assert set(calls) == wanted and len(calls) == len(wanted)


def test_progress_names_each_kernel_that_is_factorized():
    params, repaired, _, report = extracted(MLP)
    calls = []
    delta.extract(
        MLP,
        params,
        repaired,
        before_svd=lambda name, block: calls.append((name, block)),
    )
    assert [f"{name} of block {block}" for name, block in calls] == list(
        report.differences
    )


# --- The authors' files -------------------------------------------------------------


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
    found, report = delta.extract(config, params, repaired)
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
    found, _ = delta.extract(config, params, repaired)
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
        delta.extract(SWIGLU, params, repaired)
    found, report = delta.extract(SWIGLU, params, repaired, residual=1e-3)
    difference = report.differences["attn/proj of block 4"]
    # a float32 SVD turns a pair by rounding / gap, here 6e-8 / 1e-4 times a few
    assert delta.ROUNDING < difference.rest < 5e-3 * difference.change
    assert report.largest_rest == ("attn/proj of block 4", difference.rest)
    # the turn enters ε squared; σ as in the authors' recordings
    np.testing.assert_allclose(found.eps["attn/proj"][4], eps, rtol=0, atol=5e-6 * 3)


# --- The basis ----------------------------------------------------------------------


def orthogonal_kernel(leaf):
    """All singular values equal: any basis is one."""
    rng = np.random.default_rng(3)
    leaf[4] = 3 * np.linalg.qr(rng.standard_normal(leaf[4].shape))[0]


def orthogonal_repair():
    params = changed_copy(
        random_model(MLP)[0], "blocks/attn/proj/kernel", orthogonal_kernel
    )
    factors = factor.factorize(MLP, params)
    repaired = factor.merge(params, factors, random_eps(factors))
    return params, repaired


def replace_svd(monkeypatch, change):
    """From here on every kernel's factors are `change` of the computed ones."""
    compute = factor.factorize_kernel
    monkeypatch.setattr(
        factor, "factorize_kernel", lambda kernel: change(kernel, *compute(kernel))
    )


def test_equal_singular_values_keep_their_basis_on_one_machine():
    params, repaired = orthogonal_repair()
    found, _ = delta.extract(MLP, params, repaired)
    applied = delta.apply(params, found)["blocks"]["attn"]["proj"]["kernel"]
    # as in any other kernel: float32 sums
    assert relative(applied[4], repaired["blocks"]["attn"]["proj"]["kernel"][4]) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.5, 1e-3])
def test_a_basis_that_turned_is_noticed_at_any_scale(monkeypatch, scale):
    params, repaired = orthogonal_repair()
    found, _ = delta.extract(MLP, params, repaired)

    def turned(kernel, u, sigma, v):
        """Two singular vectors of equal singular values, turned by 30 degrees."""
        if not np.allclose(sigma, 3, rtol=1e-6):
            return factor.KernelFactors(u, sigma, v)
        turn = np.eye(len(sigma), dtype=np.float32)
        turn[:2, :2] = [[np.sqrt(0.75), -0.5], [0.5, np.sqrt(0.75)]]
        np.testing.assert_allclose((v @ turn) * 3 @ (u @ turn).T, kernel, atol=1e-5)
        return factor.KernelFactors(u @ turn, sigma, v @ turn)

    replace_svd(monkeypatch, turned)
    with pytest.raises(ValueError, match="attn/proj of block 4: the singular vectors"):
        delta.apply(params, found, scale)


def test_another_exact_svd_passes_with_its_own_signs(monkeypatch):
    params, repaired, found, _ = extracted(SWIGLU)

    def another(kernel, *_):
        v, sigma, ut = scipy.linalg.svd(
            kernel.astype(np.float64), full_matrices=False, lapack_driver="gesvd"
        )
        signs = np.where(np.arange(len(sigma)) % 2, 1.0, -1.0)
        return factor.KernelFactors(
            *(np.float32(x) for x in (ut.T * signs, sigma, v * signs))
        )

    replace_svd(monkeypatch, another)
    applied = kernels_of(SWIGLU, delta.apply(params, found))
    for key, kernel in kernels_of(SWIGLU, repaired).items():
        # no pair of these kernels is close: float32 rounding of factors and sums
        assert relative(applied[key], kernel) < 1e-6


# --- What is no repair, and what does not fit ---------------------------------------


def next_number(leaf):
    leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(np.inf))


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
        delta.extract(REGISTERS, params, changed_copy(repaired, path, change))
    assert "\n" not in str(error.value) and str(error.value).count(" by ") == 1


def test_many_changes_are_counted():
    params, repaired, _, _ = extracted(SWIGLU)

    def everything(leaf):
        leaf *= 1.1

    for path in ("blocks/norm1/scale", "blocks/norm2/bias", "blocks/ls1/gamma"):
        repaired = changed_copy(repaired, path, everything)
    with pytest.raises(ValueError, match="and 5 more") as error:
        delta.extract(SWIGLU, params, repaired)
    assert str(error.value).count("by 0.1") == 10


def test_other_changes_are_found_before_the_first_svd():
    params, repaired, _, _ = extracted(SWIGLU)
    repaired = changed_copy(repaired, "norm/bias", next_number)
    with pytest.raises(ValueError, match="norm/bias"):
        delta.extract(
            SWIGLU, params, repaired, before_svd=lambda *_: pytest.fail("SVD")
        )


def test_a_layout_without_mask_token_is_compared_without():
    params, repaired, found, _ = extracted(SWIGLU)
    zero = changed_copy(repaired, "mask_token", lambda leaf: leaf.fill(0))
    with pytest.raises(ValueError, match="mask_token"):
        delta.extract(SWIGLU, params, zero)
    again, _ = delta.extract(SWIGLU, params, zero, compare_mask_token=False)
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

    assert_same_delta(delta.extract(REGISTERS, params, folded(repaired))[0], found)
    assert_same_delta(delta.extract(REGISTERS, folded(params), repaired)[0], found)
    delta.apply(folded(params), found)


def test_equal_models_have_no_delta():
    params, _ = random_model(SWIGLU)
    with pytest.raises(ValueError, match="do not differ"):
        delta.extract(SWIGLU, params, params)


def test_rounding_outside_the_kernels_alone_has_no_delta():
    params, _ = random_model(SWIGLU)
    rounded = changed_copy(params, "blocks/attn/qkv/kernel", next_number)
    with pytest.raises(ValueError, match="ε is zero throughout"):
        delta.extract(SWIGLU, params, rounded)


@pytest.mark.parametrize("side", ["base", "repaired"])
def test_numbers_that_are_not_finite_are_refused(side):
    params, repaired, _, _ = extracted(SWIGLU)
    models = {"base": params, "repaired": repaired}
    models[side] = changed_copy(
        models[side], "blocks/mlp/w3/kernel", lambda leaf: leaf.fill(np.nan)
    )
    with pytest.raises(ValueError, match="blocks/mlp/w3/kernel.*NaN"):
        delta.extract(SWIGLU, models["base"], models["repaired"])


def test_another_base_is_refused():
    params, repaired, found, _ = extracted(SWIGLU)
    for other in (repaired, changed_copy(params, "norm/bias", next_number)):
        theirs = param_tree.digest(param_tree.flatten(other))
        message = f"digest {found.base[:12]}…, this model has {theirs[:12]}….* only"
        with pytest.raises(ValueError, match=message) as error:
            delta.apply(other, found)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.001, np.nan, np.inf])
def test_a_scale_out_of_range_is_refused(scale):
    params, _, found, _ = extracted(SWIGLU)
    with pytest.raises(ValueError, match="expected above 0 and at most 1"):
        delta.apply(params, found, scale)
    with pytest.raises(ValueError, match="to undo a repair, use the base file"):
        delta.repaired_leaf(found, "norm/bias", params["norm"]["bias"], scale)


def test_a_leaf_of_another_model_is_refused():
    params, _, found, _ = extracted(SWIGLU)
    kernel = params["blocks"]["mlp"]["w3"]["kernel"]
    for path, leaf in {
        "blocks/mlp/fc1/kernel": kernel,
        "blocks/mlp/w3/kernel": kernel[:4],
        "blocks/attn/proj/kernel": kernel,
        "norm/bias": kernel,
    }.items():
        with pytest.raises(ValueError, match=f"{path} is float32"):
            delta.repaired_leaf(found, path, leaf)
    with pytest.raises(ValueError, match="is float16"):
        delta.repaired_leaf(found, "blocks/mlp/w3/kernel", np.float16(kernel))


def test_eps_of_a_run_must_fit_and_not_be_zero():
    params, factors = random_model(SWIGLU)
    eps = random_eps(factors)
    zero = jax.tree.map(np.zeros_like, eps)
    with pytest.raises(ValueError, match="ε is zero throughout"):
        delta.from_eps(SWIGLU, params, factors, zero)
    with pytest.raises(ValueError, match="eps must hold"):
        delta.from_eps(SWIGLU, params, factors, {"mlp/w3": eps["mlp/w3"]})
    with pytest.raises(ValueError, match="factors u, sigma, v of attn/v"):
        delta.from_eps(SWIGLU, params, factors.replace(u=factors.v, v={}), eps)
    for value in (np.nan, np.inf):
        broken = changed_copy({"e": eps["mlp/w3"]}, "e", lambda e, x=value: e.fill(x))
        with pytest.raises(ValueError, match="eps of mlp/w3 must be finite"):
            delta.from_eps(SWIGLU, params, factors, {**eps, "mlp/w3": broken["e"]})
    nan = {**factors.v, "mlp/w3": np.full_like(factors.v["mlp/w3"], np.nan)}
    with pytest.raises(ValueError, match="probe of mlp/w3 must be finite"):
        delta.from_eps(SWIGLU, params, factors.replace(v=nan), eps)
    with pytest.raises(ValueError, match="params do not fit"):
        delta.from_eps(MLP, params, factors, eps)
