"""Deltas: what `apply` puts back, on the base alone, and nothing else passes."""

import jax
import numpy as np
import pytest
import scipy.linalg

from deltas import (
    MLP,
    SWIGLU,
    TOUCHED,
    assert_same_bytes,
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
from sinder_jax import delta, difference, factor, kernels, param_tree


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


# --- The basis ------------------------------------------------------------------------


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
    found, _ = difference.extract(MLP, params, repaired)
    applied = delta.apply(params, found)["blocks"]["attn"]["proj"]["kernel"]
    # as in any other kernel: float32 sums
    assert relative(applied[4], repaired["blocks"]["attn"]["proj"]["kernel"][4]) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.5, 1e-3])
def test_a_basis_that_turned_is_noticed_at_any_scale(monkeypatch, scale):
    params, repaired = orthogonal_repair()
    found, _ = difference.extract(MLP, params, repaired)

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


# --- What does not fit ----------------------------------------------------------------


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
