"""Linear maps of the blocks and singular defect directions.

Recorded numbers, quadrature, random probes, and identities of the running product.
"""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from flax import traverse_util

import golden
import reference
from recorded import recorded_model, reference_model
from samples import relative
from sinder_jax import defects, kernels, param_tree, vit

SMALL = {"gelu": ("gelu", 2), "swiglu": ("swiglu", 3)}  # recording, planted block


def cosines(a, b):
    """|cos| between the rows; a singular vector has no sign."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return np.abs(np.sum(a * b, axis=-1))


@functools.cache
def recorded_defects(name):
    return defects.singular_defects(*recorded_model(name))


def random_params(config, gain):
    """Random params whose branches change a token by about `gain` times itself."""
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(param_tree.shapes(config), sep="/")
    values = {}
    for path, leaf in flat.items():
        values[path] = rng.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("gamma"):
            values[path] *= np.float32(gain)
    return traverse_util.unflatten_dict(values, sep="/")


# --- The map of attention -------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiglu", "moving"])
def test_attention_map_matches_the_recorded_one(name):
    config, params = recorded_model(name)
    arrays, _ = golden.load(name)
    for block in range(config.depth):
        ours = defects.attention_map(kernels.weights(config, params, block))
        # recorded in float32
        assert relative(ours, arrays[f"linear/attn_A_{block}"]) < 1e-6
        other = arrays[f"linear/attn_A_{(block + 1) % config.depth}"]
        assert relative(ours, other) > 0.1  # the control


@pytest.mark.parametrize("name", golden.NAMES)
def test_attention_map_matches_the_reference(name):
    config, params = recorded_model(name)
    for block in range(config.depth):
        ours = defects.attention_map(kernels.weights(config, params, block))
        assert ours.dtype == np.float64
        expected = reference.attention_map(reference_model(name), block)
        assert relative(ours, expected) < 1e-13  # float64 on both sides


def test_attention_map_is_attention_when_all_tokens_are_equal():
    """Up to its constant: the difference of two images of equal tokens is A·Δ."""
    config, params = recorded_model("swiglu")
    model, rng = reference_model("swiglu"), np.random.default_rng(0)
    # unit LayerNorm statistics, so that only its centering and scale are left
    x = rng.standard_normal((2, config.embed_dim))
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True))
    after = [
        reference.after_attention(model, 3, np.tile(token, (7, 1)))[0] for token in x
    ]
    expected = defects.attention_map(kernels.weights(config, params, 3)) @ (x[0] - x[1])
    # the epsilon of LayerNorm, 1e-6 of a variance of 1
    assert relative(after[0] - after[1], expected) < 2e-6


# --- The exact fit of a hidden layer --------------------------------------------------


def hidden_units(norms, biases, dim=5):
    """All pairs of a row norm and a bias, as rows of random orientation."""
    rng = np.random.default_rng(1)
    pairs = np.array([(n, b) for n in norms for b in biases])
    rows = rng.standard_normal((len(pairs), dim))
    rows *= pairs[:, :1] / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, pairs[:, 1]


def density(deviations=12.0, nodes=400_001):
    """Nodes z and weights of a dense trapezoidal rule for E[f(z)], z ~ N(0, 1)."""
    z, step = np.linspace(-deviations, deviations, nodes, retstep=True)
    return z, np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * step


NORMS, BIASES = (0.0, 1e-3, 0.5, 1.0, 4.0, 32.0), (-3.0, -0.2, 0.0, 1.5)


def test_gelu_fit_matches_quadrature_of_the_least_squares_fit():
    """J = E[h xᵀ]: along w it is E[GELU(b + ‖w‖z) z], across it zero."""
    rows, biases = hidden_units(NORMS, BIASES)
    z, weight = density()
    fit = defects.hidden_fit("mlp", rows, biases)
    for found, row, bias in zip(fit, rows, biases, strict=True):
        norm = np.linalg.norm(row)
        a = bias + norm * z
        along = np.sum(a * scipy.special.ndtr(a) * z * weight)
        unit = row / norm if norm else row
        # float64 rounding of terms as large as the gate
        atol = 1e-14 * max(1.0, norm)
        np.testing.assert_allclose(found, along * unit, rtol=0, atol=atol)


def test_swiglu_fit_matches_dense_quadrature_of_the_least_squares_fit():
    """J = E[h xᵀ], also where the gate is steep (‖w1‖ = 32) or constant (w1 = 0).

    The last units have a value row parallel to the gate's and a value row of zero.
    """
    gates, b1 = hidden_units(NORMS, BIASES)
    rng = np.random.default_rng(2)
    values, b2 = rng.standard_normal(gates.shape), rng.standard_normal(len(gates))
    values[-1], values[-2] = -2 * gates[-1], 0
    fit = defects.hidden_fit(
        "swiglu", np.concatenate([gates, values]), np.concatenate([b1, b2])
    )
    z, weight = density()
    for found, w1, c1, w2, c2 in zip(fit, gates, b1, values, b2, strict=True):
        norm = np.linalg.norm(w1)
        unit = w1 / norm if norm else w1
        a = c1 + norm * z
        silu = a * scipy.special.expit(a)
        along = np.sum(silu * (c2 + (w2 @ unit) * z) * z * weight)
        across = np.sum(silu * weight)
        expected = along * unit + across * (w2 - (w2 @ unit) * unit)
        # 2e-14 is what 1,025 nodes leave at the steepest gate
        error = np.linalg.norm(found - expected)
        assert error < 5e-14 * max(1.0, np.linalg.norm(expected))


def test_constant_gate_scales_the_value_rows():
    w2 = np.array([[1.0, -2.0, 0.5]])
    weight, bias = np.concatenate([0 * w2, w2]), np.array([0.7, 3.0])
    expected = 0.7 * scipy.special.expit(0.7) * w2
    fit = defects.hidden_fit("swiglu", weight, bias)
    np.testing.assert_allclose(fit, expected, rtol=1e-13)


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_block_map_matches_the_reference(name):
    config, params = recorded_model(name)
    model = reference_model(name)
    for block in range(config.depth):
        ours = defects.ffn_map(kernels.weights(config, params, block))
        # two quadratures, summed up in float64: 4e-14 measured
        assert relative(ours, reference.ffn_map(model, block)) < 1e-12
        ours = defects.block_map(config, params, block)
        assert relative(ours, reference.block_map(model, block)) < 1e-12


# --- Random probes --------------------------------------------------------------------


@functools.cache
def probed_map(name, block, seed, num_probes):
    config, params = recorded_model(name)
    return defects.ffn_map(
        kernels.weights(config, params, block),
        "monte_carlo",
        key=jax.random.key(seed),
        num_probes=num_probes,
    )


@pytest.mark.parametrize("kind", SMALL)
def test_probes_approach_the_analytic_map_as_one_over_root_n(kind):
    name, block = SMALL[kind]
    exact = defects.ffn_map(kernels.weights(*recorded_model(name), block))
    few, many = (
        np.mean(
            [relative(probed_map(name, block, seed, n), exact) for seed in range(3)]
        )
        for n in (2_000, 32_000)
    )
    # √16, to the scatter of three fits each: 4.05 and 3.79 measured
    assert few / many == pytest.approx(4.0, rel=0.2)


@pytest.mark.parametrize("kind", SMALL)
def test_analytic_map_is_nearer_to_400k_probes_than_100k_fits_to_each_other(kind):
    """Expected: 1/2 against √2 of the deviation of one fit to 100,000 probes."""
    name, block = SMALL[kind]
    exact = defects.ffn_map(kernels.weights(*recorded_model(name), block))
    best = probed_map(name, block, 0, 400_000)
    one, other = (probed_map(name, block, seed, 100_000) for seed in (1, 2))
    between = np.linalg.norm(one - other)
    assert 0.25 < np.linalg.norm(exact - best) / between < 0.5


def test_probes_follow_the_key():
    """The same key the same bits, None is key 0, another key or block others."""
    config, params = recorded_model("gelu")

    def fit(block, params=params, **key):
        weights = kernels.weights(config, params, block)
        return defects.ffn_map(weights, "monte_carlo", num_probes=9_000, **key)

    first = fit(0, key=jax.random.key(0))
    np.testing.assert_array_equal(first, fit(0))
    np.testing.assert_array_equal(first, fit(0, key=jax.random.key(0)))
    assert relative(fit(0, key=jax.random.key(1)), first) > 1e-4
    same = jax.tree.map(lambda x: np.repeat(x[:1], len(x), axis=0), params["blocks"])
    one, other = (fit(block, {"blocks": same}) for block in (0, 1))
    np.testing.assert_array_equal(one, first)
    assert relative(other, first) > 1e-4


def test_probed_directions_follow_key_and_number():
    config, params = recorded_model("gelu")
    run = functools.partial(
        defects.singular_defect_directions, config, params, "monte_carlo"
    )
    first = run(key=jax.random.key(0), num_probes=20_000)
    np.testing.assert_array_equal(first, run(num_probes=20_000))
    other = run(key=jax.random.key(1), num_probes=20_000)
    assert not np.array_equal(first, other)
    # from block 2 on the direction is determined (gap 7 and more): fits agree
    assert cosines(first, other)[2:].min() > 0.999
    exact = defects.singular_defect_directions(config, params)
    assert cosines(first, exact)[2:].min() > 0.999


# --- Directions -----------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_directions_match_the_recorded_ones(name):
    arrays, _ = golden.load(name)
    ours = recorded_defects(name)
    assert cosines(ours.directions, arrays["singular_defects"]).min() > 0.999
    # the control: another block's direction is not near
    turned = np.roll(arrays["singular_defects"], 1, axis=0)
    assert cosines(ours.directions, turned).min() < 0.9


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_directions_match_the_reference(name):
    ours = recorded_defects(name)
    expected = reference.singular_defect_directions(reference_model(name))
    # an angle of 1e-6 at the worst gap, 1.02: the second order of it is below this
    assert cosines(ours.directions, expected).min() > 1 - 1e-12
    norms = np.linalg.norm(ours.directions, axis=1)
    np.testing.assert_allclose(norms, 1.0, rtol=0, atol=1e-12)
    alone = defects.singular_defect_directions(*recorded_model(name))
    np.testing.assert_array_equal(alone, np.float32(ours.directions))


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_log_values_and_gaps_match_an_unscaled_product(name):
    config, params = recorded_model(name)
    ours, product = recorded_defects(name), np.eye(config.embed_dim)
    assert ours.log_values.shape == (config.depth, 2)
    for block in range(config.depth):
        product = defects.block_map(config, params, block) @ product
        values = np.linalg.svd(product, compute_uv=False)[:2]
        # float64; the second is read off squares, a few times less exact
        np.testing.assert_allclose(np.exp(ours.log_values[block]), values, rtol=1e-9)
        assert ours.gaps[block] == pytest.approx(values[0] / values[1], rel=1e-9)
        assert ours.gaps[block] > 1


@pytest.mark.parametrize("ffn_layer", vit.FFN_LAYERS)
def test_forty_blocks_of_huge_gain_do_not_overflow(ffn_layer):
    """Scaling by powers of two is exact, so it shows what the product would be."""
    config = vit.ViTConfig(8, 40, 2, ffn_layer, img_size=28)
    params = random_params(config, gain=1e8)
    ours = defects.singular_defects(config, params)
    assert np.isfinite(ours.directions).all() and np.isfinite(ours.log_values).all()
    plain, scaled, exponent = np.eye(8), np.eye(8), 0
    for block in range(config.depth):
        map_ = defects.block_map(config, params, block)
        with np.errstate(all="ignore"):
            plain = map_ @ plain
        scaled = map_ @ scaled
        power = np.frexp(np.abs(scaled).max())[1]
        scaled, exponent = np.ldexp(scaled, -power), exponent + int(power)
        u, values, _ = np.linalg.svd(scaled)
        assert cosines(ours.directions[block], u[:, 0]) > 1 - 1e-10
        log = np.log(values[0]) + exponent * np.log(2)
        assert ours.log_values[block, 0] == pytest.approx(log, rel=1e-12)
    assert not np.isfinite(plain).all()  # the control
    assert ours.log_values[-1, 0] > 710  # e^710 is more than float64 holds


def test_token_pushed_through_the_product_turns_towards_the_direction():
    """The more, the larger the gap; and a random token alone does not point there."""
    config, params = recorded_model("swiglu")
    ours, rng = recorded_defects("swiglu"), np.random.default_rng(3)
    tokens = rng.standard_normal((2_000, config.embed_dim))
    before = [cosines(tokens, d[None, :]).mean() for d in np.asarray(ours.directions)]
    assert max(before) < 0.12  # √(2/π)/8, random in 64 dimensions
    after = []
    for block, direction in enumerate(np.asarray(ours.directions)):
        tokens = tokens @ defects.block_map(config, params, block).T
        after.append(cosines(tokens, direction[None, :]).mean())
    # the gap is 1.1 in the first three blocks and above 5 from block 3 on
    assert max(after[:3]) < 0.3 < 0.5 < min(after[3:])


def test_real_tokens_of_the_defect_point_along_the_direction():
    """And the other tokens of the image do not."""
    arrays, meta = golden.load("swiglu")
    block = meta["log"][0]["layer"]
    tokens = arrays[f"tokens/block_{block}"][0, 1:]
    direction = np.asarray(recorded_defects("swiglu").directions[block])
    angles = cosines(tokens, direction[None, :]).reshape(arrays["step0/mask"].shape)
    assert angles[arrays["step0/mask"]].min() > 0.9
    assert np.median(angles) < 0.3


# --- Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        defects.singular_defect_directions,
        defects.singular_defects,
        functools.partial(defects.block_map, block=0),
        lambda *model, **fit: defects.ffn_map(kernels.weights(*model, 0), **fit),
    ],
    ids=["directions", "defects", "block", "ffn"],
)
def test_unknown_method_and_too_few_probes_raise(function):
    config, params = recorded_model("gelu")
    message = r"method must be one of \('analytic', 'monte_carlo'\), got 'exact'"
    with pytest.raises(ValueError, match=message):
        function(config, params, method="exact")
    message = "num_probes=47 probes do not determine a fit of width 48"
    with pytest.raises(ValueError, match=message):
        function(config, params, method="monte_carlo", num_probes=47)
