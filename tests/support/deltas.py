"""Random repairs of small models, and how deltas are compared."""

import functools

import numpy as np
import pytest

from sinder_jax import delta, difference, factor, kernels, param_tree, vit

SWIGLU = vit.ViTConfig(16, 5, 2, "swiglu", img_size=28)


MLP = vit.ViTConfig(12, 5, 2, "mlp", img_size=28)


REGISTERS = vit.ViTConfig(16, 5, 2, "mlp", img_size=28, num_register_tokens=4)


# An FFN that is narrower than the tokens: w3 has 12 singular values, not 16.
NARROW = vit.ViTConfig(16, 5, 2, "swiglu", img_size=28, hidden_width=12)


MODELS = {"swiglu": SWIGLU, "mlp": MLP, "registers": REGISTERS, "narrow": NARROW}


SIZES = (0.0, 1e-6, 1e-4, 0.0, 1e-1)  # of ε, by block


TOUCHED = (1, 2, 4)


every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@functools.cache
def random_model(config):
    """(params, factors) with kernels of the size of a trained model's."""
    rng = np.random.default_rng(0)
    params = param_tree.unflatten(
        {
            path: rng.standard_normal(leaf.shape).astype(np.float32) * 0.3
            for path, leaf in param_tree.flatten(param_tree.shapes(config)).items()
        }
    )
    return params, factor.factorize(config, params)


def random_eps(factors, sizes=SIZES):
    rng = np.random.default_rng(1)
    size = np.array(sizes)[:, None]
    return {
        name: (size * rng.standard_normal(sigma.shape)).astype(np.float32)
        for name, sigma in factors.sigma.items()
    }


def random_delta(config):
    params, factors = random_model(config)
    return delta.from_eps(config, params, factors, random_eps(factors))


@functools.cache
def extracted(config):
    """(params, repaired params, delta, report) of a random repair."""
    params, factors = random_model(config)
    repaired = factor.merge(params, factors, random_eps(factors))
    return params, repaired, *difference.extract(config, params, repaired)


def changed_copy(params, path, change):
    """A copy of `params` in which `change` has been called on one leaf."""
    flat = param_tree.flatten(params)
    flat[path] = flat[path].copy()
    change(flat[path])
    return param_tree.unflatten(flat)


def next_number(leaf):
    leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(np.inf))


def kernels_of(config, params):
    """{(name, block): kernel}"""
    _, stacks = kernels.split(config, params)
    return {(name, b): k for name, stack in stacks.items() for b, k in enumerate(stack)}


def assert_same_bytes(got, want):
    got, want = param_tree.flatten(got), param_tree.flatten(want)
    assert set(got) == set(want)
    for path in want:
        assert np.asarray(got[path]).tobytes() == np.asarray(want[path]).tobytes(), path


def assert_same_delta(got, want):
    assert (got.config, got.base) == (want.config, want.base)
    assert_same_bytes(got.eps, want.eps)
    assert_same_bytes(got.probe, want.probe)
