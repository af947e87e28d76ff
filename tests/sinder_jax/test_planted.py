"""planted.py: the directions find what was planted, and every image sets it off."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

import photos
from experiments import config as config_files
from experiments.run import inputs
from samples import random_params
from sinder_jax import defects, param_tree, planted, repair, vit
from sinder_jax.analysis import defective
from sinder_jax.analysis.tokens import last_patches, patch_tokens
from sinder_jax.data import decode, listing
from sinder_jax.model import Model

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


# --- In another model -----------------------------------------------------------------

FEW = vit.ViTConfig(embed_dim=32, depth=3, num_heads=2, ffn_layer="mlp", img_size=140)


@functools.cache
def other_model(ffn_layer: str) -> Model:
    config = dataclasses.replace(FEW, ffn_layer=ffn_layer)
    return Model.of(config, random_params(config))


def noise_images(count: int = 3) -> np.ndarray:
    size = FEW.img_size
    return np.random.default_rng(0).normal(size=(count, size, size, 3)).astype("f4")


@pytest.mark.parametrize("ffn_layer", vit.FFN_LAYERS)
def test_planting_changes_one_unit_and_a_few_positions(ffn_layer):
    model = other_model(ffn_layer)
    made = planted.plant(model, noise_images(), block=1, seed=0)
    param_tree.check(made.config, made.params)
    assert made.block == 1
    np.testing.assert_allclose(np.linalg.norm(made.direction), 1, rtol=1e-6)
    assert abs(made.direction.sum()) < 1e-6  # which a LayerNorm lets through
    before, after = (param_tree.flatten(x) for x in (model.params, made.params))
    first, last = ("w12", "w3") if ffn_layer == "swiglu" else ("fc1", "fc2")
    names = [f"{first}/kernel", f"{first}/bias", f"{last}/kernel"]
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"pos_embed", *(f"blocks/mlp/{name}" for name in names)}
    rows = np.any(before["pos_embed"] != after["pos_embed"], axis=-1)[0]
    assert not rows[0] and rows.sum() == planted.KEPT[0]
    columns = before[f"blocks/mlp/{last}/kernel"] != after[f"blocks/mlp/{last}/kernel"]
    assert np.argwhere(columns.any(axis=-1)).tolist() == [[1, made.unit]]


def test_the_planted_unit_throws_the_leaning_tokens_along_the_direction():
    """In a block before the defect that the small model has already."""
    small = model(0)
    images = np.stack([pixels(name) for name in PHOTOGRAPHS])
    given = Model.of(small.config, small.params)
    made = planted.plant(given, images[::2], block=2, seed=0)
    leaning = np.any(made.params["pos_embed"] != small.params["pos_embed"], axis=-1)
    at_spots = leaning[0, 1:].reshape(16, 16)
    for image in images[1::2]:  # others than it was planted on
        before, after = (
            np.asarray(patch_tokens(small.config, params, image, (2,)))[0]
            for params in (small.params, made.params)
        )
        thrown = (after - before) @ made.direction
        assert thrown[at_spots].min() > 5 * np.abs(thrown[~at_spots]).mean()
        # as far as a token has to get to count as defective
        assert np.median(thrown[at_spots]) > 3 * np.median(
            np.linalg.norm(before, axis=-1)
        )


def test_a_seed_plants_the_same_defect_and_another_seed_another():
    made = [
        planted.plant(other_model("mlp"), noise_images(), block=1, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert jax.tree.all(jax.tree.map(np.array_equal, made[0].params, made[1].params))
    assert abs(made[0].direction @ made[2].direction) < 0.9


def test_a_defect_is_planted_in_a_block_that_exists():
    with pytest.raises(ValueError, match="no block 3"):
        planted.plant(other_model("mlp"), noise_images(), block=3, seed=0)
