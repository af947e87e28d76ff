"""planted.py: the directions find what was planted, and every image sets it off."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

import photos
from experiments import config as config_files
from experiments.run import inputs
from sinder_jax import defects, param_tree, planted, repair, vit
from sinder_jax.analysis import defective
from sinder_jax.analysis.tokens import last_patches
from sinder_jax.data import decode, listing

TINY = config_files.load("tiny.py")
SEEDS = [TINY.seed, 0, 7]  # the demo's, and others that nobody looked at
SIDE = planted.CONFIG.img_size
PHOTOGRAPHS = {file.name: file for file in listing.sample_images()}


@functools.cache
def model(seed: int) -> planted.PlantedModel:
    return planted.planted_model(seed)


@functools.cache
def found(seed: int) -> defects.SingularDefects:
    return defects.singular_defects(model(seed).config, model(seed).params)


@functools.cache
def pixels(name: str) -> np.ndarray:
    """A sample photograph by its file name, or an image nobody would take."""
    if name in PHOTOGRAPHS:
        image = photos.crop(decode.read_rgb(PHOTOGRAPHS[name]), SIDE)
    elif name == "noise":
        noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        image = Image.fromarray(noise)
    else:
        image = Image.new("RGB", (SIDE, SIDE), name)
    return photos.normalize(image)


@functools.cache
def device_params(seed: int):
    return jax.device_put(model(seed).params)


def angles(seed: int) -> np.ndarray:
    """Between the computed directions and the planted one, degrees, sign ignored."""
    cosine = np.abs(np.asarray(found(seed).directions) @ model(seed).direction)
    return np.degrees(np.arccos(np.minimum(cosine, 1)))


# --- The linear map shows it ----------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_computed_directions_are_the_planted_one_from_its_block_on(seed):
    angle, block = angles(seed), model(seed).block
    assert block == planted.BLOCK == 5
    assert (angle[block:] < 15).all()
    # Two random vectors of width 128 are rarely nearer than 70 degrees.
    assert (angle[:block] > 70).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gap_opens_at_the_planted_block(seed):
    gaps, block = found(seed).gaps, model(seed).block
    assert (gaps[:block] < 1.1).all()  # no direction of its own
    assert (gaps[block:] > 5).all()  # measured 10.6 to 11.5 over six seeds


def test_the_authors_probes_find_the_planted_direction_too():
    planted_model = model(TINY.seed)
    directions = defects.singular_defect_directions(
        planted_model.config,
        planted_model.params,
        "monte_carlo",
        key=jax.random.key(TINY.seed),
        num_probes=20_000,
    )
    cosine = np.abs(np.asarray(directions) @ planted_model.direction)
    assert (cosine[planted_model.block :] > np.cos(np.radians(15))).all()


# --- Any image sets it off ------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*PHOTOGRAPHS, "noise", "black", "gray", "white"])
def test_every_image_has_defects_in_the_last_block(name, seed):
    tokens = last_patches(model(seed).config, device_params(seed), pixels(name))
    # Outliers are never on the border, so these are interior tokens.
    direction = found(seed).directions[-1]
    mask = np.asarray(defective.detect(tokens, direction, mask_thr=TINY.mask_thr).mask)
    large = np.asarray(defective.large_norms(np.linalg.norm(tokens, axis=-1)))
    assert 3 <= mask.sum() <= planted.NUM_SPOTS
    assert 3 <= large.sum() <= planted.NUM_SPOTS
    assert (mask | ~large).all()  # nothing is thrown but along the direction


@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_finds_it_in_the_planted_block_of_every_photograph(seed):
    made = model(seed)
    options = inputs.repair_options(TINY)
    frozen, state = repair.init(
        made.config, made.params, options, found(seed).directions
    )
    images = np.stack([pixels(name) for name in PHOTOGRAPHS])
    _, metrics = repair.make_step(made.config, options)(state, frozen, images)
    np.testing.assert_array_equal(metrics.layer, made.block)
    assert (np.asarray(metrics.num_outliers) >= 3).all()
    assert np.asarray(metrics.finite).all()


# --- A model like any other -----------------------------------------------------------


def test_params_are_finite_float32_numpy_arrays_of_the_architecture():
    made = model(TINY.seed)
    param_tree.check(made.config, made.params)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(made.params))
    assert vit.patch_grid(made.config, SIDE, SIDE) == (16, 16)
    np.testing.assert_allclose(np.linalg.norm(made.direction), 1, rtol=1e-12)


def test_a_seed_gives_the_same_bytes_and_another_seed_another_model():
    again = planted.planted_model(TINY.seed)
    same = jax.tree.map(np.array_equal, model(TINY.seed).params, again.params)
    assert jax.tree.all(same)
    cosine = model(0).direction @ model(1).direction
    assert abs(cosine) < 0.5
    kernels = [model(seed).params["blocks"]["mlp"]["w3"]["kernel"] for seed in (0, 1)]
    assert not np.array_equal(*kernels)


def test_without_the_planted_unit_nothing_is_found():
    """Negative control: the defect is the unit's doing, not the random weights'."""
    made = planted.planted_model(TINY.seed)
    made.params["blocks"]["mlp"]["w3"]["kernel"][made.block, 0] = 0
    directions = defects.singular_defect_directions(made.config, made.params)
    cosine = np.abs(np.asarray(directions) @ made.direction)
    assert (cosine < np.cos(np.radians(45))).all()
    params = jax.device_put(made.params)
    for name in PHOTOGRAPHS:
        tokens = last_patches(made.config, params, pixels(name))
        norms = np.linalg.norm(tokens, axis=-1)
        assert norms.max() < 3 * np.median(norms)
