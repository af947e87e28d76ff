import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from samples import SMALL, random_params
from sinder_jax import checkpoint, model, param_tree
from sinder_jax.model import Model
from sinder_jax.storage import errors

CONFIG = SMALL["mlp"]
PROVENANCE = {"source": "made up", "steps": ["first"]}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture
def stored(params, tmp_path):
    checkpoint.save(tmp_path / "model", CONFIG, params, PROVENANCE)
    return model.open_checkpoint(tmp_path / "model")


def test_a_stored_model_is_the_model_in_memory(stored, params):
    memory = Model.of(CONFIG, params, PROVENANCE)
    assert stored.config == memory.config and stored.provenance == PROVENANCE
    assert stored.known_digest == memory.digest == param_tree.digest(params)
    for (name, got), (other, want) in zip(
        stored.leaves(), memory.leaves(), strict=True
    ):
        assert name == other
        np.testing.assert_array_equal(got, want)


def test_params_are_read_once_until_forgotten(stored):
    reads = []
    counted = dataclasses.replace(
        stored, leaf=lambda path: reads.append(path) or stored.leaf(path)
    )
    first = counted.params
    assert counted.params is first and len(reads) == len(counted.shapes)
    counted.forget()
    assert counted.params is not first and len(reads) == 2 * len(counted.shapes)


def test_params_in_memory_are_never_lost(params):
    memory = Model.of(CONFIG, params)
    memory.forget()
    assert memory.params is params


def test_leaves_of_jax_arrays_are_numpy(params):
    params = params | {"cls_token": jnp.asarray(params["cls_token"])}
    leaf = Model.of(CONFIG, params).leaf("cls_token")
    assert isinstance(leaf, np.ndarray)


def test_leaves_that_contradict_the_stated_digest_are_refused(stored):
    def changed(path):
        return stored.leaf(path) + 1

    other = dataclasses.replace(stored, leaf=changed, sha256={})
    with pytest.raises(errors.DamagedError, match="do not match the digest"):
        dict(other.leaves())


def test_save_refuses_leaves_that_contradict_the_digest_and_leaves_nothing(
    stored, tmp_path
):
    other = dataclasses.replace(stored, known_digest="0" * 64)
    with pytest.raises(errors.DamagedError):
        model.save(tmp_path / "copy", other)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_saved_copy_has_its_new_step_and_the_same_digest(stored, tmp_path):
    digest = model.save(tmp_path / "copy", stored.with_step("second"))
    copy = model.open_checkpoint(tmp_path / "copy")
    assert copy.provenance["steps"] == ["first", "second"]
    assert copy.digest == stored.digest == digest


def test_differences_name_each_field_with_both_values():
    other = dataclasses.replace(
        CONFIG, depth=7, img_size=98, interpolate_antialias=True, interpolate_offset=0.3
    )
    depth = f"depth ({CONFIG.depth} and 7)"
    grid = f"img_size ({CONFIG.img_size} and 98)"
    assert model.differences(CONFIG, other) == f"{depth}, {grid}"
    assert model.differences(CONFIG, other, grid=False) == depth
    assert model.differences(CONFIG, CONFIG) == ""


def test_models_of_two_architectures_are_refused_by_path_and_field(stored):
    other = dataclasses.replace(CONFIG, num_heads=2 * CONFIG.num_heads)
    second = dataclasses.replace(stored, config=other)
    with pytest.raises(ValueError, match=rf"{stored.path} and .*: num_heads \("):
        model.check_same_architecture(stored, second)
    model.check_same_architecture(stored, stored)


def test_a_list_in_place_of_any_field_is_refused_in_one_line():
    told = model.description(CONFIG, {})
    for name in told["config"]:
        for value in ([], {}, [[1]]):
            wrong = told | {"config": told["config"] | {name: value}}
            with pytest.raises(ValueError) as caught:
                model.parse_description(wrong)
            assert "\n" not in str(caught.value)
