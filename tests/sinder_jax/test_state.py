"""Start, storage and result of a repair; options and their limits."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from recorded import (
    assert_same_bits,
    changed,
    factors,
    fields,
    flat,
    host,
    setting,
    start,
    stored,
)
from sinder_jax import defects, factor, kernels, param_tree, repair

# --- Options --------------------------------------------------------------------------


def test_default_options_are_the_authors():
    """DESIGN's numbers, which are those of the authors' giant run."""
    assert repair.RepairOptions() == repair.RepairOptions(
        lr=0.005,
        momentum=0.9,
        mask_thr=4.0,
        min_outliers=3,
        window=3,
        temperature=0.1,
        active_blocks=10,
        reduce="sum",
        matmul_precision="highest",
        max_iter=30_000,
        history=1_000,
        stop_share=0.75,
        first_block=0,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("momentum", float("nan")),
        ("mask_thr", 0.0),
        ("min_outliers", 0),
        ("window", 4),
        ("window", 7),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("active_blocks", 0),
        ("active_blocks", -1),
        ("first_block", -1),
        ("reduce", "max"),
        ("matmul_precision", "bfloat16"),
        ("max_iter", 0),
        ("history", 0),
        ("stop_share", 0.0),
        ("stop_share", 1.01),
        ("stop_share", float("nan")),
    ],
)
def test_option_out_of_range_raises_with_its_name_and_value(name, value):
    message = rf"{name} must be .*{re.escape(str(value))}"
    with pytest.raises(ValueError, match=message):
        repair.RepairOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", 0.0),
        ("active_blocks", None),
        ("active_blocks", 1),
        ("min_outliers", 1),
        ("max_iter", 1),
        ("history", 1),
        ("stop_share", 1.0),
        ("window", 5),
        ("reduce", "mean"),
        ("matmul_precision", "high"),
        ("matmul_precision", "default"),
    ],
)
def test_option_at_the_end_of_its_range_is_accepted(name, value):
    assert getattr(repair.RepairOptions(**{name: value}), name) == value


# --- The start ------------------------------------------------------------------------


def test_first_state_is_zero_with_a_history_full_of_defects():
    case, (_, state) = setting("gelu"), start("gelu")
    _, stacks = kernels.split(case.config, case.params)
    for name in kernels.names(case.config):
        size = min(stacks[name].shape[1:])
        for zero in (state.eps[name], state.momentum[name]):
            assert zero.shape == (case.config.depth, size)
            assert zero.dtype == np.float32
            assert not np.any(zero)
    assert_same_bits(state.merged, stacks)
    assert state.had_defect.shape == (case.options.history,)
    assert np.all(state.had_defect)
    for name in ("num_images", "num_counted", "num_bad", "bad_in_row"):
        assert getattr(state, name) == 0


def test_frozen_part_holds_every_weight_once_and_no_trainable_kernel():
    case, (frozen, state) = setting("gelu"), start("gelu")
    trainable = {f"blocks/{name}/kernel" for name in state.merged}
    paths = flat(frozen.params)
    assert not trainable & paths.keys()
    total = sum(x.size for x in paths.values())
    total += sum(x.size for x in state.merged.values())
    assert total == param_tree.num_params(case.config)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_start_computes_directions_and_factors(name):
    case, (frozen, _) = setting(name), start(name, directions=None, factors=None)
    want = factor.factorize(case.config, case.params)
    for part in ("u", "sigma", "v"):
        assert_same_bits(getattr(frozen.factors, part), getattr(want, part))
    directions = defects.singular_defect_directions(case.config, case.params)
    # normalized once more: float32 rounding of entries up to 1
    np.testing.assert_allclose(frozen.directions, directions, rtol=0, atol=2e-7)
    cosines = np.abs(np.sum(frozen.directions * case.directions, axis=1))
    # the recorded ones are fits to random probes; 0.9996 measured in the worst block
    assert cosines.min() > 0.999


def test_first_block_that_does_not_exist_raises():
    case = setting("gelu")
    options = repair.RepairOptions(first_block=case.config.depth)
    with pytest.raises(ValueError, match=f"block {case.config.depth}"):
        repair.init(case.config, case.params, options)


def test_given_directions_are_normalized_and_replace_the_computed_ones():
    rng = np.random.default_rng(0)
    given = rng.standard_normal((6, 48)) * 100  # float64, far from unit length
    given[1] *= -1e-4
    given[4] = 0
    frozen, _ = start("gelu", directions=given)
    lengths = np.linalg.norm(given, axis=1, keepdims=True)
    want = given / np.where(lengths == 0, 1, lengths)  # signs kept, zero stays zero
    assert frozen.directions.dtype == np.float32
    np.testing.assert_allclose(frozen.directions, want, rtol=0, atol=2e-7)
    assert not np.any(frozen.directions[4])


def test_given_factors_replace_the_computed_ones():
    """Another valid basis: every second pair of vectors with its sign turned."""
    computed = factors("gelu")
    turned = factor.Factors(
        u={
            k: np.where(np.arange(u.shape[-1]) % 2, -u, u)
            for k, u in computed.u.items()
        },
        sigma=computed.sigma,
        v={
            k: np.where(np.arange(v.shape[-1]) % 2, -v, v)
            for k, v in computed.v.items()
        },
    )
    frozen, state = start("gelu", factors=turned)
    for part in ("u", "sigma", "v"):
        assert_same_bits(getattr(frozen.factors, part), getattr(turned, part))
    assert changed(frozen.factors.u, computed.u) == set(state.eps)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (np.ones((5, 48)), r"directions must be \[6, 48\].*got \[5, 48\]"),
        (np.ones((6, 47)), r"directions must be \[6, 48\].*got \[6, 47\]"),
        (np.ones(48), r"directions must be \[6, 48\].*got \[48\]"),
        (np.full((6, 48), np.nan), "directions.* not finite"),
        (np.full((6, 48), -np.inf), "directions.* not finite"),
    ],
    ids=["a-block-too-few", "too-narrow", "one-row", "nan", "inf"],
)
def test_directions_that_do_not_fit_raise(directions, message):
    with pytest.raises(ValueError, match=message):
        start("gelu", directions=directions)


def altered_params(path: str, alter: Any) -> dict[str, Any]:
    """The params of `gelu` with one leaf replaced; None removes it."""
    leaves = traverse_util.flatten_dict(setting("gelu").params, sep="/")
    leaf = alter(np.array(leaves.pop(path, np.zeros(()))))
    leaves |= {} if leaf is None else {path: leaf}
    return traverse_util.unflatten_dict(leaves, sep="/")


@pytest.mark.parametrize(
    ("path", "alter", "message"),
    [
        ("blocks/ls1/gamma", lambda _: None, "blocks/ls1/gamma is missing"),
        (
            "blocks/mlp/fc1/kernel",
            lambda x: x[:5],
            r"fc1/kernel has shape \(5, 48, 192",
        ),
        ("head/kernel", lambda _: np.ones(3), "head/kernel is surplus"),
    ],
    ids=["missing", "misshapen", "surplus"],
)
def test_params_that_do_not_fit_raise(path, alter, message):
    case = setting("gelu")
    with pytest.raises(ValueError, match=message):
        repair.init(case.config, altered_params(path, alter), case.options)


def with_nan(x: np.ndarray) -> np.ndarray:
    x.flat[0] = np.nan
    return x


@pytest.mark.parametrize(
    "path",
    [
        "cls_token",
        "blocks/norm1/scale",
        "blocks/attn/qkv/kernel",
        "blocks/mlp/fc1/kernel",
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "computed"])
def test_params_that_are_not_finite_raise(path, given):
    """Also where directions and factors are given, so that nothing is computed."""
    case, params = setting("gelu"), altered_params(path, with_nan)
    rest = (case.directions, factors("gelu")) if given else ()
    with pytest.raises(ValueError, match=f"not finite: .*{path}"):
        repair.init(case.config, params, case.options, *rest)


@pytest.mark.parametrize(
    ("part", "alter", "message"),
    [
        ("u", lambda x: x[:, :, :-1], "factors u, sigma, v of mlp/fc2 must be"),
        ("sigma", lambda x: x[:-1], "factors u, sigma, v of mlp/fc2 must be"),
        ("v", lambda x: x[:, :-1], "factors u, sigma, v of mlp/fc2 must be"),
        ("sigma", with_nan, "factors.* not finite"),
    ],
    ids=["u", "sigma", "v", "nan"],
)
def test_factors_that_do_not_fit_raise(part, alter, message):
    stacks = dict(getattr(factors("gelu"), part))
    stacks["mlp/fc2"] = alter(np.array(stacks["mlp/fc2"]))
    given = factors("gelu").replace(**{part: stacks})
    with pytest.raises(ValueError, match=message):
        start("gelu", factors=given)


def test_factors_of_another_ffn_raise():
    wrong = factors("gelu").replace(u={}, sigma={}, v={})
    with pytest.raises(ValueError, match="factors u, sigma, v of attn/v must be"):
        start("gelu", factors=wrong)


# --- Storage and result ---------------------------------------------------------------


def some_state() -> tuple[repair.Frozen, dict[str, Any]]:
    """Fields to store: ε in blocks 1 and 3 only, and none as at the start."""
    frozen, state = start("gelu")
    rng = np.random.default_rng(1)
    moved = np.isin(np.arange(6), (1, 3)).astype(np.float32)[:, None]

    def random():
        return {
            name: moved * 0.01 * rng.standard_normal(zero.shape, np.float32)
            for name, zero in state.eps.items()
        }

    return frozen, {
        "eps": random(),
        "momentum": random(),
        "num_images": np.int32(19),
        "had_defect": rng.random(1_000) < 0.5,
        "num_counted": np.int32(17),
        "num_bad": np.int32(3),
        "bad_in_row": np.int32(2),
    }


def test_saved_fields_are_all_but_the_kernels():
    _, state = start("gelu")
    everything = fields(state)
    del everything["merged"]
    assert_same_bits(repair.to_saved(state), stored(everything))


def test_saved_state_comes_back_with_its_bits_and_merges_its_kernels():
    case, (frozen, values) = setting("gelu"), some_state()
    back = repair.from_saved(case.config, case.params, frozen, stored(values))
    assert_same_bits(host(back), values | {"merged": host(back)["merged"]})
    assert_same_bits(repair.to_saved(back), stored(values))
    merged = factor.merge(case.params, frozen.factors, values["eps"])
    assert_same_bits(repair.merged_params(frozen, back), merged)
    _, stacks = kernels.split(case.config, case.params)
    for name, kernel in stacks.items():
        same = [
            np.array_equal(back.merged[name][block], kernel[block])
            for block in range(case.config.depth)
        ]
        assert same == [True, False, True, False, True, True]


def test_zero_epsilon_gives_back_the_params_bit_for_bit():
    case, (frozen, state) = setting("swiglu"), start("swiglu")
    assert_same_bits(repair.merged_params(frozen, state), case.params)


@pytest.mark.parametrize("field", ["eps", "momentum"])
@pytest.mark.parametrize("what", ["empty", "one-kernel", "a-block-too-few"])
def test_saved_state_of_another_model_raises(field, what):
    case, (frozen, values) = setting("gelu"), some_state()
    values[field] = {
        "empty": {},
        "one-kernel": {"attn/v": values[field]["attn/v"]},
        "a-block-too-few": {name: x[1:] for name, x in values[field].items()},
    }[what]
    with pytest.raises(ValueError, match="must hold.*like the singular values; got"):
        repair.from_saved(case.config, case.params, frozen, stored(values))


def test_steps_leave_what_was_handed_to_them_alive():
    """The state is donated to the step; params, factors and saved arrays are not."""
    case = setting("gelu")
    params = jax.tree.map(jnp.asarray, case.params)
    given = jax.tree.map(jnp.asarray, factors("gelu"))
    directions = jnp.asarray(case.directions)
    frozen, first = repair.init(case.config, params, case.options, directions, given)
    step = repair.make_step(case.config, case.options)
    second, _ = step(first, frozen, case.images[:1])
    saved = repair.to_saved(second)
    kept = jax.tree.map(np.array, saved)
    third = repair.from_saved(case.config, params, frozen, saved)
    step(third, frozen, case.images[:1])
    for leaf in jax.tree.leaves((params, given, directions, frozen, saved)):
        assert not leaf.is_deleted()
    assert_same_bits(params, case.params)
    assert_same_bits(saved, kept)
