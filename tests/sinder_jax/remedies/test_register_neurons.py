"""register_neurons.py: the planted unit is found, and its throw leaves the image.

Every number has a control that fails: other units, another block, an activation that
stays where it is, an added token that stays in the output.
"""

import doctest
import functools

import jax
import numpy as np
import pytest

import convert
import golden
import photos
import reference
from real import backbone
from samples import error_of
from sinder_jax import planted, vit
from sinder_jax.analysis.defective import large_norms, norm_ratio
from sinder_jax.analysis.tokens import cosine, last_patches, token_norms
from sinder_jax.data import listing
from sinder_jax.remedies import register_neurons as registers
from sinder_jax.remedies.register_neurons import NONE, Neurons

SEEDS = range(12)
PLANTED = (planted.BLOCK, 0)


@functools.cache
def model(seed=0):
    return planted.planted_model(seed)


@functools.cache
def on_device(seed=0):
    return jax.device_put(model(seed).params)


@functools.cache
def photograph(index):
    return photos.prepared(listing.sample_images()[index], planted.CONFIG.img_size)


def without_the_unit(seed=0):
    params = jax.tree.map(np.copy, model(seed).params)
    params["blocks"]["mlp"]["w3"]["kernel"][PLANTED] = 0
    return params


def neurons(*pairs):
    blocks, units = np.reshape(pairs, (-1, 2)).astype(int).T
    return Neurons(blocks, units, np.ones(len(pairs)))


def patches_after(found, seed=0, index=3):
    """Raw patch tokens of the last block, with the neurons moved."""
    config = model(seed).config
    last = (config.depth - 1,)
    image = photograph(index)[None]
    (tokens,) = registers.intermediates(config, on_device(seed), found, image, last)
    grid = vit.patch_grid(config, *image.shape[1:3])
    return vit.split_tokens(config, tokens, *grid)[2][0]


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(registers)
    assert result.attempted >= 4 and result.failed == 0


# --- On the planted models ------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_neuron_found_is_the_planted_unit_and_its_throw_leaves_the_image(seed):
    made, images = model(seed), [photograph(index) for index in (0, 1)]
    found = registers.find(made.config, on_device(seed), images)
    assert (made.block, made.unit) == PLANTED
    assert list(zip(found.blocks, found.units, strict=True)) == [PLANTED]
    assert found.scores[0] > 10  # other units stay below 2
    before = last_patches(made.config, on_device(seed), photograph(3))
    after = patches_after(found, seed)
    flawed = np.asarray(large_norms(token_norms(before)))
    norms = np.asarray(token_norms(after))
    assert flawed.sum() >= 3 and norm_ratio(token_norms(before)) > 5
    # No longer than sound tokens get: those are within 1.4 times their median.
    assert norms[flawed].max() < 1.4 * np.median(norms[~flawed])
    assert not np.asarray(large_norms(norms)).any()
    sound = np.asarray(cosine(before, after))[~flawed]
    assert sound.mean() > 0.99 and sound.min() > 0.98
    truth = last_patches(made.config, without_the_unit(seed), photograph(3))
    assert np.asarray(cosine(truth, after)).min() > 0.999


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(neurons((planted.BLOCK, 1)), id="another unit"),
        pytest.param(neurons((planted.BLOCK - 1, 0)), id="the block before"),
        pytest.param(neurons((planted.BLOCK + 1, 0)), id="the block after"),
        pytest.param(NONE, id="no unit"),
    ],
)
def test_other_neurons_leave_the_outliers_where_they_are(wrong):
    norms = token_norms(patches_after(wrong))
    before = token_norms(last_patches(model().config, on_device(), photograph(3)))
    assert norm_ratio(norms) > 5
    np.testing.assert_array_equal(large_norms(norms), large_norms(before))
    mended = token_norms(patches_after(neurons(PLANTED)))
    assert norm_ratio(mended) < 1.5


def test_a_model_without_the_planted_unit_has_no_neurons():
    found = registers.find(model().config, without_the_unit(), [photograph(0)])
    assert found is NONE


def test_only_units_up_to_the_block_of_the_outliers_count():
    """A unit of a later block that answers to the thrown tokens alone is no cause."""
    made = model()
    params = jax.tree.map(np.copy, made.params)
    mlp, later = params["blocks"]["mlp"], made.block + 1
    gate = 30 * made.direction
    mlp["w12"]["kernel"][later, :, 5] = gate
    mlp["w12"]["kernel"][later, :, 5 + made.config.hidden_dim] = gate
    found = registers.find(made.config, params, [photograph(0)])
    assert list(zip(found.blocks, found.units, strict=True)) == [PLANTED]
    flawed = large_norms(token_norms(last_patches(made.config, params, photograph(0))))
    activity = registers._activity(made.config, params, photograph(0), flawed)
    assert activity[later, 5] > 2 * activity[PLANTED]  # the control


def test_the_most_active_units_come_first_and_no_more_than_asked_for():
    scores = np.array([[1.0, 9.0, 4.4], [5.0, 8.0, 4.6]])
    found = registers._highest(scores, 10)
    assert found.blocks.tolist() == [0, 1, 1, 1]
    assert found.units.tolist() == [1, 1, 0, 2]  # 4.4 is less than half of 9
    assert found.scores.tolist() == [9.0, 8.0, 5.0, 4.6]
    assert registers._highest(scores, 2).units.tolist() == [1, 1]


# --- What is moved --------------------------------------------------------------------


def reference_tokens(ref, image, pairs, *, move=True):
    """The same once more in float64: all tokens after the last block, added one last.

    One image, one unit, one block after the other.
    """
    x = reference.embed(ref, image)
    x = np.concatenate([x, np.zeros((1, x.shape[1]))])
    name = "mlp.fc2" if ref.ffn_layer == "mlp" else "mlp.w3"
    for block in range(ref.depth):
        x = reference.after_attention(ref, block, x)
        inner = reference.normalized(ref, block, "norm2", x)
        h = reference.hidden(ref, block, inner)
        for at, unit in pairs:
            if at == block and move:
                own = h[:-1, unit]
                largest = own[np.argmax(np.abs(own))]
                h[:, unit] = 0
                h[-1, unit] = largest
        gamma = ref.block(block, "ls2.gamma")
        x = x + gamma * reference.dense(ref, block, name, h)
    return x


@pytest.mark.parametrize("name", ["swiglu", "gelu", "registers"])
def test_the_forward_pass_matches_the_reference(name):
    arrays, meta = golden.load(name)
    ref = reference.Model.from_golden(arrays, meta)
    state = golden.state(arrays)
    fields = {key: meta[key] for key in ("interpolate_antialias", "interpolate_offset")}
    config, params = convert.from_torch(state, num_heads=meta["num_heads"], **fields)
    images = np.moveaxis(arrays["images"], 1, -1)[:2]
    pairs = [(0, 3), (1, 7), (1, 8)]
    own = reference_tokens(ref, arrays["images"][0], pairs)[:-1]

    def difference(blocks_and_units):
        got = registers.intermediates(
            config, params, neurons(*blocks_and_units), images, (config.depth - 1, 0)
        )
        assert got[0].shape == (2, *own.shape)
        return np.linalg.norm(got[0][0] - own) / np.linalg.norm(own)

    assert difference(pairs) < 1e-5
    # Controls: one unit fewer, another unit; and a reference that moves nothing.
    assert difference(pairs[:2]) > 1e-4
    assert difference([(0, 4), *pairs[1:]]) > 1e-4
    still = reference_tokens(ref, arrays["images"][0], pairs, move=False)[:-1]
    assert np.linalg.norm(still - own) / np.linalg.norm(own) > 1e-4


def test_features_are_the_normed_tokens_without_the_added_one():
    made, images = model(), np.stack([photograph(2), photograph(3)])
    features = registers.forward(made.config, on_device(), neurons(PLANTED), images)
    assert features.patches.shape == (2, 16, 16, planted.WIDTH)
    assert features.registers.shape == (2, 0, planted.WIDTH)
    raw = np.asarray(patches_after(neurons(PLANTED)), np.float64)
    norm = (np.float64(made.params["norm"][x]) for x in ("scale", "bias"))
    expected = reference.layer_norm(raw, *norm)
    np.testing.assert_allclose(features.patches[1], expected, atol=2e-5)
    plain = registers.forward(made.config, on_device(), NONE, images)
    assert cosine(plain.cls, features.cls).min() > 0.99


def test_the_largest_activation_goes_to_the_last_token_with_its_sign():
    activations = np.array(
        [[[1.0, 5.0, 2.0], [3.0, -7.0, 2.5], [9.0, 90.0, 4.0]]], np.float32
    )
    units = np.array([True, True, False])
    moved = registers.to_added_token(*map(jax.numpy.asarray, (activations, units)))
    expected = [[0.0, 0.0, 2.0], [0.0, 0.0, 2.5], [3.0, -7.0, 4.0]]
    np.testing.assert_array_equal(moved[0], expected)


def test_images_do_not_see_each_other():
    made, found = model(), neurons(PLANTED)
    images = np.stack([photograph(2), photograph(3)])
    together = registers.forward(made.config, on_device(), found, images)
    alone = registers.forward(made.config, on_device(), found, images[1:])
    np.testing.assert_allclose(together.patches[1], alone.patches[0], atol=1e-5)


# --- Without neurons it is the plain model --------------------------------------------


def test_without_neurons_the_features_are_the_plain_models_bit_for_bit():
    made, image = model(), photograph(0)[None]
    plain = jax.jit(vit.ViT(made.config).apply)({"params": on_device()}, image)
    ours = registers.forward(made.config, on_device(), NONE, image)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)
    last = registers.intermediates(made.config, on_device(), NONE, image, (11,))[0]
    want = last_patches(made.config, on_device(), photograph(0))
    np.testing.assert_array_equal(last[0, 1:].reshape(want.shape), want)


# --- Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "blocks", "message"),
    [
        (neurons((12, 0)), (0,), "there is no block 12: blocks are 0 to 11"),
        (neurons(PLANTED), (-1,), "there is no block -1"),
        (NONE, (12,), "there is no block 12"),
        (neurons((5, 344)), (0,), "there is no hidden unit 344: units are 0 to 343"),
        (neurons((5, -1)), (0,), "there is no hidden unit -1"),
    ],
)
def test_blocks_and_units_that_do_not_exist_raise(found, blocks, message):
    image = photograph(0)[None]
    call = functools.partial(registers.intermediates, model().config, on_device())
    assert message in error_of(call, found, image, blocks)


def test_photographs_to_find_neurons_on_are_needed():
    find = functools.partial(registers.find, model().config, on_device())
    assert "give at least one" in error_of(find, [])
    assert "count must be at least 1, got 0" in error_of(find, [photograph(0)], count=0)
    assert "multiples of 14" in error_of(find, [photograph(0)[:100]])
    with pytest.raises(FloatingPointError, match="not finite"):
        find([np.full_like(photograph(0), np.nan)])


# --- On a trained model ---------------------------------------------------------------


@pytest.mark.real
def test_the_neuron_found_in_a_trained_model_is_the_planted_unit():
    trained = convert.open_model(backbone())
    config, last = trained.config, (trained.config.depth - 1,)
    images = np.stack([photos.prepared(x, 224) for x in listing.sample_images()])
    made = planted.plant(trained, images[:4], block=4, seed=0)
    truth, params = map(jax.device_put, (trained.params, made.params))
    found = registers.find(config, params, images[4:6])
    assert (found.blocks.tolist(), found.units.tolist()) == ([4], [made.unit])
    flawed, cosines = [], []
    for image in images[[0, 1, 6, 7]]:
        (tokens,) = registers.intermediates(config, params, found, image[None], last)
        after = vit.split_tokens(config, tokens, 16, 16)[2][0]
        before, wanted = (last_patches(config, x, image) for x in (params, truth))
        assert not np.asarray(large_norms(token_norms(after))).any()
        flawed.append(large_norms(token_norms(before)))
        # With the truth: the thrown tokens have changed the sound ones too.
        cosines.append(cosine(wanted, after))
    thrown = np.array(flawed)
    assert thrown.sum() >= 4
    for tokens in (thrown, ~thrown):
        assert np.array(cosines)[tokens].mean() > 0.99
