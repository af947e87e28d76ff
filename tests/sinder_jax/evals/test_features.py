import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import SMALL, error_of, random_params
from sinder_jax import vit
from sinder_jax.evals import features

CONFIG = SMALL["registers"]
PARAMS = random_params(CONFIG)


def noise(count, side=CONFIG.img_size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, side, side, 3)).astype(np.float32)


def test_normed_features_of_the_last_block_are_the_model_s():
    images = noise(2)
    found = features.extract(
        CONFIG, PARAMS, jnp.asarray(images), blocks=(CONFIG.depth - 1,)
    )
    expected = vit.ViT(CONFIG).apply({"params": PARAMS}, jnp.asarray(images))
    np.testing.assert_allclose(found.cls[0], expected.cls, atol=1e-5)
    np.testing.assert_allclose(found.patches[0], expected.patches, atol=1e-5)
    assert found.patches.shape == (1, 2, 3, 3, CONFIG.embed_dim)


def test_raw_features_are_the_model_s_tokens_block_by_block():
    images = noise(2)
    found = features.extract(
        CONFIG, PARAMS, jnp.asarray(images), blocks=(1, 0), norm=False
    )
    raw = vit.ViT(CONFIG).apply(
        {"params": PARAMS}, jnp.asarray(images), blocks=(1, 0), method="intermediates"
    )
    for i, tokens in enumerate(raw):
        np.testing.assert_array_equal(found.cls[i], tokens[:, 0])
        grid = tokens[:, 1 + CONFIG.num_register_tokens :].reshape(2, 3, 3, -1)
        np.testing.assert_array_equal(found.patches[i], grid)


def test_devices_and_fillings_change_no_bit():
    images = noise(7)
    found = [
        features.make_extract(
            CONFIG,
            PARAMS,
            blocks=(0, 1),
            group=2,
            devices=jax.devices()[:devices],
        )(images[:count])
        for devices, count in ((1, 7), (2, 7), (1, 3))
    ]
    for one, two, some in zip(*found, strict=True):
        assert one.shape[:2] == (2, 7)
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one[:, :3], some)


def test_groups_are_in_the_order_of_the_images():
    images = noise(6)
    extract = features.make_extract(
        CONFIG, PARAMS, blocks=(1,), group=2, of=features.class_token, batch_axis=0
    )
    expected = features.extract(CONFIG, PARAMS, jnp.asarray(images), blocks=(1,)).cls[0]
    np.testing.assert_allclose(extract(images), expected, atol=1e-5)
    assert not np.allclose(expected[0], expected[1], atol=1e-2)


def test_an_image_that_is_no_whole_patches_raises():
    extract = features.make_extract(CONFIG, PARAMS, blocks=(1,))
    assert "multiples of 14" in error_of(extract, noise(1, side=40))


def test_the_last_blocks_are_the_oldest_first():
    assert features.last_blocks(vit.CONFIGS["dinov2_vits14"], 4) == (8, 9, 10, 11)
    assert "expected 1 to 2" in error_of(features.last_blocks, CONFIG, 3)


@pytest.mark.parametrize("block", [-1, 2])
def test_a_block_that_does_not_exist_raises(block):
    with pytest.raises(ValueError, match="blocks are 0 to 1"):
        features.extract(CONFIG, PARAMS, jnp.asarray(noise(1)), blocks=(block,))
