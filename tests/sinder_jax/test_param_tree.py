import hashlib

import ml_dtypes
import numpy as np
import pytest

from samples import SMALL, random_params
from sinder_jax import param_tree


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
def test_digest_of_an_array_is_that_of_its_bytes_in_c_order(dtype):
    array = np.arange(12).reshape(3, 4).astype(np.dtype(dtype)).T
    want = hashlib.sha256(array.tobytes()).hexdigest()
    assert param_tree.digest_of_array(array) == want


def test_digest_of_a_number_and_of_nothing():
    number = np.asarray(1.5, ml_dtypes.bfloat16)
    assert (
        param_tree.digest_of_array(number)
        == hashlib.sha256(number.tobytes()).hexdigest()
    )
    assert (
        param_tree.digest_of_array(np.empty((0, 3))) == hashlib.sha256(b"").hexdigest()
    )


def test_order_of_the_leaves_does_not_matter():
    flat = param_tree.flatten(random_params(SMALL["registers"]))
    backwards = dict(reversed(flat.items()))
    assert param_tree.digest(flat) == param_tree.digest(backwards)


@pytest.mark.parametrize("path", param_tree.flatten(random_params(SMALL["registers"])))
def test_any_bit_but_the_mask_tokens_changes_the_digest(path):
    flat = param_tree.flatten(random_params(SMALL["registers"]))
    before = param_tree.digest(flat)
    # The lowest bit of a sum may be lost: that of a positive number of its own size.
    flat[path].reshape(-1).view(np.uint32)[-1] ^= 1 << 22
    assert (param_tree.digest(flat) == before) == (path == "mask_token")


def test_a_position_added_to_the_class_token_keeps_the_digest():
    flat = param_tree.flatten(random_params(SMALL["registers"]))
    before = param_tree.digest(flat)
    flat["cls_token"] = flat["cls_token"] + flat["pos_embed"][:, :1]
    flat["pos_embed"][:, :1] = 0
    assert param_tree.digest(flat) == before


def test_names_and_shapes_are_part_of_it():
    flat = param_tree.flatten(random_params(SMALL["swiglu"]))
    before = param_tree.digest(flat)
    bias, scale = flat["norm/bias"], flat["norm/scale"]
    assert param_tree.digest(flat | {"norm/bias": scale, "norm/scale": bias}) != before
    assert param_tree.digest(flat | {"norm/bias": bias[None]}) != before
