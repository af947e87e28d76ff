"""benchmarks/precision.py: the emulation is exact if and only if it rounds nothing."""

import jax
import numpy as np
import pytest

from benchmarks import precision
from samples import relative
from sinder_jax import repair

NAME = "gelu"  # the smallest recorded run with a defect in its first image


def first_step(variant):
    case = precision.load(NAME)
    step = precision.make_step(NAME, variant)
    state, metrics, _ = step(case.state, case.frozen, case.images[:1])
    return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def plain():
    """The library's own step on the first image."""
    case = precision.load(NAME)
    step = repair.make_step(case.config, case.options)
    state = jax.tree.map(lambda x: x.copy(), case.state)  # the step donates it
    return jax.device_get(step(state, case.frozen, case.images[:1]))


def errors(got, want):
    (state, metrics), (exact, row) = got, want
    assert metrics.layer == row.layer == 2
    assert metrics.num_outliers == row.num_outliers
    eps = [
        relative(state.eps[kernel][block], eps[block])
        for kernel, eps in exact.eps.items()
        for block in np.flatnonzero(eps.any(axis=1))
    ]
    return relative(metrics.loss, row.loss), max(eps)


@pytest.mark.slow
def test_rounding_to_all_bits_of_float32_is_the_plain_step(plain):
    exact = precision.Variant("", "matmul_precision", precision.rounded(23))
    loss, eps = errors(first_step(exact), plain)
    # the same operations, which the compiler fuses differently
    assert loss < 1e-6 and eps < 1e-5


@pytest.mark.slow
def test_tf32_products_show(plain):
    tf32 = precision.Variant("", "matmul_precision", precision.rounded(precision.TF32))
    loss, eps = errors(first_step(tf32), plain)
    # 10 bits of mantissa round by 2**-11 = 5e-4; sums over tokens average some of it
    assert 1e-5 < loss < 1e-2 and 1e-4 < eps < 1e-1


def test_operands_are_rounded_to_the_nearest_even_inside_loops_too():
    x = np.float32(
        [[1 + 2**-11, 1 + 3 * 2**-11]]
    )  # both halfway between two TF32 values

    def squares(x):
        def square(_):
            return jax.numpy.matmul(x, x.T, precision="high")

        return jax.lax.map(square, np.arange(2))

    def emulated(bits):
        return precision.emulated(squares, precision.rounded(bits), lambda _: True)(x)

    exact = 1 + (1 + 2 * 2**-10) ** 2
    np.testing.assert_array_equal(emulated(precision.TF32), np.full((2, 1, 1), exact))
    np.testing.assert_array_equal(emulated(precision.BFLOAT16), np.full((2, 1, 1), 2.0))
