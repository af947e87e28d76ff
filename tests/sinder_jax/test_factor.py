"""Factorizing, merging and the layers of a factored kernel, as identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from threadpoolctl import threadpool_info, threadpool_limits

import convert
import golden
from samples import AWKWARD, relative
from sinder_jax import factor, kernels, layers, param_tree, vit

SWIGLU = vit.ViTConfig(16, 3, 2, "swiglu", img_size=28)
MLP = vit.ViTConfig(12, 2, 2, "mlp", img_size=28)


def flat(tree):
    return traverse_util.flatten_dict(dict(tree), sep="/")


def assert_same_bytes(got, want):
    got, want = flat(got), flat(want)
    assert set(got) == set(want)
    for path in want:
        assert np.asarray(got[path]).tobytes() == np.asarray(want[path]).tobytes(), path


@functools.cache
def random_params(config):
    """NumPy params with kernels of the size of a trained model's."""
    rng = np.random.default_rng(0)
    values = {
        path: rng.standard_normal(leaf.shape).astype(np.float32) * 0.3
        for path, leaf in flat(param_tree.shapes(config)).items()
    }
    return traverse_util.unflatten_dict(values, sep="/")


@functools.cache
def recorded_model(name):
    """(config, params, factors) of a recording."""
    arrays, meta = golden.load(name)
    state = golden.state(arrays)
    config, params = convert.from_torch(state, num_heads=meta["num_heads"])
    return config, params, factor.factorize(config, params)


def zeros_like(tree):
    return jax.tree.map(np.zeros_like, tree)


def rebuilt(factors, name, block, eps=0.0):
    """U diag(σ + ε) Vᵀ in float64, as a kernel [in, out]."""
    u, sigma, v = (
        np.asarray(part[name][block], np.float64)
        for part in (factors.u, factors.sigma, factors.v)
    )
    return (u @ np.diag(sigma + eps) @ v.T).T


# --- Factorizing ----------------------------------------------------------------------


def factors_of(kernel):
    """`factorize` of a params tree whose fc1 is `kernel`."""
    params = random_params(MLP)
    stack = np.stack([kernel, 2 * kernel[::-1]]).astype(np.float32)
    mlp = {**params["blocks"]["mlp"], "fc1": {"kernel": stack, "bias": None}}
    blocks = {**params["blocks"], "mlp": mlp}
    return stack, factor.factorize(MLP, {**params, "blocks": blocks})


@pytest.mark.parametrize("shape", AWKWARD)
def test_factors_rebuild_a_kernel_and_are_orthonormal(shape):
    stack, factors = factors_of(AWKWARD[shape])
    depth, width_in, width_out = stack.shape
    size = min(width_in, width_out)
    u, sigma, v = (part["mlp/fc1"] for part in (factors.u, factors.sigma, factors.v))
    assert u.shape == (depth, width_out, size)
    assert sigma.shape == (depth, size)
    assert v.shape == (depth, width_in, size)
    assert {part.dtype for part in (u, sigma, v)} == {np.dtype(np.float32)}
    for block in range(depth):
        # all bounds: each number rounded once to float32, 6e-8 of itself
        largest = np.linalg.norm(stack[block], 2)
        error = rebuilt(factors, "mlp/fc1", block) - stack[block].astype(np.float64)
        assert np.linalg.norm(error, 2) <= 3e-7 * largest
        for basis in (u[block], v[block]):
            basis = basis.astype(np.float64)
            np.testing.assert_allclose(basis.T @ basis, np.eye(size), atol=3e-7)
        assert np.all(sigma[block] >= 0) and np.all(np.diff(sigma[block]) <= 0)
        exact = np.linalg.svd(stack[block].astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(sigma[block], exact, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("shape", AWKWARD)
def test_a_single_kernel_has_the_factors_of_the_stack_bit_for_bit(shape):
    stack, factors = factors_of(AWKWARD[shape])
    for block, kernel in enumerate(stack):
        alone = factor.factorize_kernel(kernel)
        for name, part in alone._asdict().items():
            stacked = getattr(factors, name)["mlp/fc1"][block]
            assert part.dtype == np.float32 and part.flags.c_contiguous
            assert part.tobytes() == stacked.tobytes(), name


def test_only_an_inaccurate_kernel_of_two_sides_gets_an_svd(monkeypatch):
    decomposed = []
    svd = np.linalg.svd
    monkeypatch.setattr(
        np.linalg, "svd", lambda a, *rest: decomposed.append(a.shape) or svd(a, *rest)
    )
    for shape in ("tall", "wide"):
        factor.factorize_kernel(AWKWARD[shape])
    assert decomposed == []
    for shape in ("square", "tall-spread", "wide-spread", "rank-deficient", "zero"):
        factor.factorize_kernel(AWKWARD[shape])
        assert decomposed.pop() == AWKWARD[shape].shape and not decomposed


def test_a_kernel_is_factorized_with_one_thread_whoever_asks(monkeypatch):
    """More threads sum in another order, and turn vectors of close singular values."""
    threads, svd = [], np.linalg.svd

    def counted(*args, **options):
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return svd(*args, **options)

    monkeypatch.setattr(np.linalg, "svd", counted)
    with threadpool_limits(2):
        before = [pool["num_threads"] for pool in threadpool_info()]
        assert 2 in before  # not in all: some library may have a single thread
        factor.factorize_kernel(AWKWARD["square"])
        assert threads and set(threads) == {1}
        assert [pool["num_threads"] for pool in threadpool_info()] == before


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_singular_values_match_the_recorded_ones(name):
    arrays, meta = golden.load(name)
    config, _, factors = recorded_model(name)
    sigma = factors.sigma
    assert tuple(sigma) == golden.kernels(meta) == kernels.names(config)
    for kernel, values in sigma.items():
        for block in range(config.depth):
            recorded = arrays[golden.sigma_name(block, kernel)]
            # a float32 SVD is exact to a few 1e-7 of the largest singular value
            atol = 3e-6 * recorded[0]
            np.testing.assert_allclose(values[block], recorded, rtol=0, atol=atol)


# --- Merging --------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SWIGLU, MLP], ids=["swiglu", "mlp"])
def test_zero_eps_gives_back_the_very_bits(config):
    params = random_params(config)
    factors = factor.factorize(config, params)
    merged = factor.merge(params, factors, zeros_like(factors.sigma))
    assert_same_bytes(merged, params)
    # the control: built from its factors a kernel has other bits
    name = "attn/proj"
    parts = (part[name][0] for part in (factors.u, factors.sigma, factors.v))
    kernel = params["blocks"]["attn"]["proj"]["kernel"][0]
    assert not np.array_equal(factor.merge_kernel(*parts), kernel)


@pytest.mark.parametrize("config", [SWIGLU, MLP], ids=["swiglu", "mlp"])
def test_merged_kernels_match_float64(config):
    params = random_params(config)
    factors = factor.factorize(config, params)
    rng = np.random.default_rng(2)
    eps = {
        name: rng.standard_normal(sigma.shape).astype(np.float32)
        for name, sigma in factors.sigma.items()
    }
    merged = factor.merge(params, factors, eps)
    assert {leaf.dtype for leaf in flat(merged).values()} == {np.dtype(np.float32)}
    _, stacks = kernels.split(config, merged)
    _, before = kernels.split(config, params)
    for name, stack in stacks.items():
        for block, kernel in enumerate(stack):
            expected = rebuilt(factors, name, block, eps[name][block])
            # sums of 16 float32 products
            assert relative(kernel, expected) < 1e-6
            assert relative(kernel, before[name][block]) > 0.1


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_recorded_eps_merges_to_the_recorded_kernels(name):
    arrays, meta = golden.load(name)
    config, params, factors = recorded_model(name)
    eps = golden.stacked(arrays, meta, "final_epsilon")
    merged = convert.to_torch(config, factor.merge(params, factors, eps))
    recorded = golden.state(arrays, "merged")
    assert set(merged) == set(recorded)
    for key, kernel in recorded.items():
        # ours and theirs are two bases of close singular values: 2.5e-6 measured
        assert relative(merged[key], kernel) < 1e-5, key
    # the control: without ε it would not pass
    original = golden.state(arrays)
    assert max(relative(original[key], x) for key, x in recorded.items()) > 1e-3


def test_only_kernels_of_blocks_with_eps_change():
    """One number of one kernel: its block's four kernels are merged, no other."""
    params = random_params(SWIGLU)
    factors = factor.factorize(SWIGLU, params)
    eps = zeros_like(factors.sigma)
    eps["mlp/w3"][1, 4] = 0.5
    merged = flat(factor.merge(params, factors, eps))
    changed = set()
    for path, leaf in flat(params).items():
        if path.startswith("blocks/"):
            other = {
                b for b in range(3) if not np.array_equal(leaf[b], merged[path][b])
            }
            assert other <= {1}, path
            changed |= {path} if other else set()
        else:
            np.testing.assert_array_equal(merged[path], leaf)
    assert "blocks/mlp/w3/kernel" in changed
    assert changed <= {f"blocks/{p}/kernel" for p in ("attn/qkv", "attn/proj")} | {
        f"blocks/mlp/{p}/kernel" for p in ("w12", "w3")
    }
    width = SWIGLU.embed_dim
    q_and_k = flat(params)["blocks/attn/qkv/kernel"][:, :, : 2 * width]
    np.testing.assert_array_equal(
        merged["blocks/attn/qkv/kernel"][:, :, : 2 * width], q_and_k
    )


def test_merging_changes_neither_the_params_nor_their_memory():
    params = random_params(SWIGLU)
    before = jax.tree.map(np.copy, params)
    factors = factor.factorize(SWIGLU, params)
    eps = jax.tree.map(np.ones_like, factors.sigma)
    merged = factor.merge(params, factors, eps)
    assert_same_bytes(params, before)
    kernel = params["blocks"]["mlp"]["w3"]["kernel"]
    assert not np.shares_memory(merged["blocks"]["mlp"]["w3"]["kernel"], kernel)


def test_merge_kernel_has_the_same_bits_within_a_larger_program():
    """Step, `merge`, resume and export must agree on them."""
    factors = factor.factorize(SWIGLU, random_params(SWIGLU))
    parts = tuple(part["mlp/w12"] for part in (factors.u, factors.sigma, factors.v))
    rng = np.random.default_rng(7)
    eps = rng.standard_normal(parts[1].shape).astype(np.float32)
    x = jnp.ones((7, SWIGLU.embed_dim))

    @jax.jit
    def larger(parts, eps):
        def use(block):
            u, sigma, v, eps = block
            kernel = factor.merge_kernel(u, sigma + eps, v)
            return kernel, x @ kernel

        return jax.lax.map(use, (*parts, eps))

    inside, _ = larger(parts, eps)
    for block in range(SWIGLU.depth):
        u, sigma, v = (part[block] for part in parts)
        alone = factor.merge_kernel(u, sigma + eps[block], v)
        np.testing.assert_array_equal(inside[block], alone)


# --- What does not fit ----------------------------------------------------------------


def test_eps_that_does_not_fit_the_factors_raises():
    params = random_params(MLP)
    factors = factor.factorize(MLP, params)
    good = zeros_like(factors.sigma)
    missing = {name: e for name, e in good.items() if name != "mlp/fc2"}
    surplus = {**good, "mlp/w3": good["mlp/fc2"]}
    short = {**good, "mlp/fc1": good["mlp/fc1"][:, :-1]}
    for eps in (missing, surplus, short, {}):
        with pytest.raises(
            ValueError, match="eps must hold .*like the singular values"
        ):
            factor.merge(params, factors, eps)
        with pytest.raises(ValueError, match="eps must hold"):
            factor.check_eps(factors, eps)
        with pytest.raises(ValueError, match="eps must hold"):
            factor.spectral_variables(MLP, params, factors, eps)
    factor.check_eps(factors, good)


@pytest.mark.parametrize("part", ["u", "sigma", "v"])
def test_factors_that_do_not_fit_the_kernels_raise(part):
    params = random_params(MLP)
    factors = factor.factorize(MLP, params)
    _, stacks = kernels.split(MLP, params)
    factor.check_factors(stacks, factors)
    arrays = getattr(factors, part)
    without = {name: x for name, x in arrays.items() if name != "attn/v"}
    turned = {**arrays, "attn/v": np.swapaxes(arrays["attn/v"], 0, 1)}
    for wrong in (without, turned):
        with pytest.raises(ValueError, match="factors u, sigma, v of attn/v must be"):
            factor.check_factors(stacks, factors.replace(**{part: wrong}))


def test_the_spectral_layer_is_part_of_the_contract():
    assert factor.SpectralDense is layers.SpectralDense
