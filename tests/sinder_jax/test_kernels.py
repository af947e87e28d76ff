"""Names, places and views of kernels; a params tree taken apart and put together."""

import doctest

import jax.numpy as jnp
import numpy as np
import pytest

from samples import SMALL, error_of, random_params
from sinder_jax import kernels, param_tree

every_model = pytest.mark.parametrize("name", SMALL)


def assert_same_bytes(got, want):
    got, want = param_tree.flatten(got), param_tree.flatten(want)
    assert set(got) == set(want)
    for path in want:
        assert np.asarray(got[path]).tobytes() == np.asarray(want[path]).tobytes(), path


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(kernels)
    assert result.attempted >= 5 and result.failed == 0


@every_model
def test_every_kernel_is_a_view_of_its_leaf(name):
    config, params = SMALL[name], random_params(SMALL[name])
    flat = param_tree.flatten(params)
    for layer in kernels.layers(config):
        leaf = flat[f"blocks/{layer}/kernel"]
        for tree in (params, flat):
            found = kernels.view(config, tree, 0, layer)
            assert np.shares_memory(found, leaf)
            np.testing.assert_array_equal(found, leaf[0])
    q, k, v = (kernels.view(config, params, 0, third) for third in kernels.THIRDS)
    qkv = flat["blocks/attn/qkv/kernel"]
    assert all(np.shares_memory(third, qkv) for third in (q, k, v))
    np.testing.assert_array_equal(np.concatenate([q, k, v], axis=1), qkv[0])
    # A view can be written through, of a stack as of one block.
    kernels.PLACES["attn/k"].of(qkv)[...] = 7
    width = config.embed_dim
    assert (qkv[..., width : 2 * width] == 7).all() and (k == 7).all()
    assert not (v == 7).any() and not (q == 7).any()


@every_model
def test_a_matrix_multiplies_a_column_in_float64(name):
    config, params = SMALL[name], random_params(SMALL[name])
    for kernel in (*kernels.names(config), *kernels.THIRDS, *kernels.layers(config)):
        found = kernels.matrix(config, params, 0, kernel)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(
            found, kernels.view(config, params, 0, kernel).T.astype(np.float64)
        )


def test_a_bias_has_the_thirds_of_its_kernel():
    bias = np.arange(2 * 12.0).reshape(2, 12)
    q, k, v = (kernels.PLACES[third].of(bias) for third in kernels.THIRDS)
    np.testing.assert_array_equal(np.concatenate([q, k, v], axis=-1), bias)
    assert v[0].tolist() == [8, 9, 10, 11]


def test_a_kernel_that_does_not_exist_raises():
    config, params = SMALL["mlp"], random_params(SMALL["mlp"])
    for function in (kernels.view, kernels.matrix):
        message = error_of(function, config, params, 0, "mlp/w3")
        assert "no kernel 'mlp/w3'" in message
        assert "attn/qkv, attn/proj, mlp/fc1" in message


@every_model
def test_split_and_join_give_back_the_very_bits(name):
    config, params = SMALL[name], random_params(SMALL[name])
    rest, stacks = kernels.split(config, params)
    assert tuple(stacks) == kernels.names(config)
    assert_same_bytes(kernels.join(rest, stacks), params)


@every_model
def test_split_trains_the_value_third_and_leaves_query_and_key(name):
    config, params = SMALL[name], random_params(SMALL[name])
    width = config.embed_dim
    rest, stacks = kernels.split(config, params)
    qkv = params["blocks"]["attn"]["qkv"]
    v = rest["blocks"]["attn"]["v"]
    np.testing.assert_array_equal(stacks["attn/v"], qkv["kernel"][:, :, 2 * width :])
    np.testing.assert_array_equal(v["bias"], qkv["bias"][:, 2 * width :])
    qk = rest["blocks"]["attn"]["qk"]
    np.testing.assert_array_equal(qk["kernel"], qkv["kernel"][:, :, : 2 * width])
    np.testing.assert_array_equal(qk["bias"], qkv["bias"][:, : 2 * width])
    trained = {f"blocks/{name}/kernel" for name in stacks}
    assert not trained & set(param_tree.flatten(rest))
    # nothing is lost, nothing is there twice
    sizes = [x.size for x in (*param_tree.flatten(rest).values(), *stacks.values())]
    assert sum(sizes) == param_tree.num_params(config)


def test_jax_arrays_split_and_join_like_numpy_arrays():
    config, params = SMALL["swiglu"], random_params(SMALL["swiglu"])
    flat = param_tree.flatten(params)
    placed = param_tree.unflatten({path: jnp.asarray(x) for path, x in flat.items()})
    assert_same_bytes(kernels.join(*kernels.split(config, placed)), params)
