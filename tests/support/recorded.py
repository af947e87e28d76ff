"""The recorded models in the library's terms, and states compared bit by bit."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

import convert
import golden
import reference
from sinder_jax import factor, repair, vit


class Setting(NamedTuple):
    """A recorded model in the library's terms."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    config: vit.ViTConfig
    params: dict[str, Any]
    options: repair.RepairOptions
    images: np.ndarray  # [n, height, width, 3]
    directions: np.ndarray  # [L, D], as recorded


@functools.cache
def recorded_model(name: str) -> tuple[vit.ViTConfig, dict[str, Any]]:
    """Architecture and params of a recorded model."""
    arrays, meta = golden.load(name)
    return convert.from_torch(
        golden.state(arrays),
        num_heads=meta["num_heads"],
        interpolate_antialias=meta["interpolate_antialias"],
        interpolate_offset=meta["interpolate_offset"],
    )


@functools.cache
def reference_model(name: str) -> reference.Model:
    """The recorded model in float64, by the reference."""
    return reference.Model.from_golden(*golden.load(name))


def recorded_images(name: str) -> np.ndarray:
    """The images of a recording, [n, height, width, 3]."""
    arrays, _ = golden.load(name)
    return np.ascontiguousarray(arrays["images"].transpose(0, 2, 3, 1))


@functools.cache
def setting(name: str) -> Setting:
    """The setting of a recorded repair, a name of `golden.REPAIRED`."""
    arrays, meta = golden.load(name)
    config, params = recorded_model(name)
    options = repair.RepairOptions(**golden.options(meta))
    directions = arrays["singular_defects"]
    images = recorded_images(name)
    return Setting(arrays, meta, config, params, options, images, directions)


@functools.cache
def factors(name: str) -> factor.Factors:
    """The factors of a recorded model; their SVD takes longer than most tests."""
    return factor.factorize(setting(name).config, setting(name).params)


def start(name: str, **given: Any) -> tuple[repair.Frozen, repair.RepairState]:
    """`repair.init` with the recorded directions, unless other ones are given."""
    case = setting(name)
    given = {"directions": case.directions, "factors": factors(name)} | given
    return repair.init(case.config, case.params, case.options, **given)


def fields(state: repair.RepairState) -> dict[str, Any]:
    """All of a state as a dict, kernels included."""
    return {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }


def host(state: repair.RepairState) -> dict[str, Any]:
    """A copy of `fields` that outlives the next step."""
    return jax.tree.map(np.array, fields(state))


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by path, of a tree of dicts."""
    leaves = traverse_util.flatten_dict(dict(tree), sep="/")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def changed(one: Any, other: Any) -> set[str]:
    """Paths of the leaves whose bytes differ; -0 is not 0, a nan is itself."""
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    assert all(one[path].dtype == other[path].dtype for path in one)
    assert all(one[path].shape == other[path].shape for path in one)
    return {path for path in one if one[path].tobytes() != other[path].tobytes()}


def assert_same_bits(one: Any, other: Any) -> None:
    assert not changed(one, other)


def nested(kernels: dict[str, Any]) -> dict[str, Any]:
    """Arrays by the parts of their names, as `to_saved` has them."""
    return traverse_util.unflatten_dict(kernels, sep="/")


def stored(values: dict[str, Any]) -> dict[str, Any]:
    """Fields in the form of `to_saved`."""
    kernels = {name: nested(values[name]) for name in ("eps", "momentum")}
    return values | kernels


def image_with_overflowing_loss() -> np.ndarray:
    """`gelu`'s image 0, one patch beside an outlier 1e20 times too bright.

    Every token is finite, but the square of that one's norm, and so the loss, is not.
    """
    case = setting("gelu")
    row, column = np.argwhere(case.arrays["step0/mask"])[0] - (0, 1)
    patch = case.config.patch_size
    image = np.array(case.images[0])
    rows, columns = (slice(i * patch, (i + 1) * patch) for i in (row, column))
    image[rows, columns] = 1e20
    return image
