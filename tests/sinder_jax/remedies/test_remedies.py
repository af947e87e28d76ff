"""remedies/: every remedy under its name, run by one forward pass."""

import functools

import jax
import numpy as np
import pytest

import photos
from samples import SMALL, error_of, random_params
from sinder_jax import planted, vit
from sinder_jax.analysis.defective import norm_ratio
from sinder_jax.analysis.tokens import token_norms
from sinder_jax.data import listing
from sinder_jax.model import Model
from sinder_jax.remedies import REMEDIES, register_neurons


@functools.cache
def model() -> Model:
    made = planted.planted_model(0)
    return Model.of(made.config, made.params)


@functools.cache
def photograph(index):
    return photos.prepared(listing.sample_images()[index], planted.CONFIG.img_size)


def mended() -> Model:
    """As a repair would: the throw of the planted unit is a tenth of what it was."""
    params = jax.tree.map(np.copy, model().params)
    params["blocks"]["mlp"]["w3"]["kernel"][planted.BLOCK, 0] *= 0.1
    return Model.of(model().config, params)


def norm_ratio_after(name):
    """Largest to median norm of a photograph that no remedy has seen."""
    given = {"": None, "gamma": 2.0, "repaired": mended()}
    given["photographs"] = [photograph(0), photograph(1)]
    params, neurons = REMEDIES[name].apply(model(), given[REMEDIES[name].needs])
    image, config = photograph(3)[None], model().config
    (tokens,) = register_neurons.intermediates(
        config, jax.device_put(params), neurons, image, (config.depth - 1,)
    )
    grid = vit.patch_grid(config, *image.shape[1:3])
    patches = vit.split_tokens(config, tokens, *grid)[2]
    return float(norm_ratio(token_norms(patches))[0])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "data-free" else name
        for name in REMEDIES
    ],
)
def test_every_remedy_but_none_takes_the_outliers_away(name):
    ratio = norm_ratio_after(name)
    assert ratio > 5 if name == "nothing" else ratio < 1.6


def test_nothing_and_a_model_without_defect_keep_their_bits():
    sound = jax.tree.map(np.copy, model().params)
    sound["blocks"]["mlp"]["w3"]["kernel"][planted.BLOCK, 0] = 0
    sound = Model.of(model().config, sound)
    for name, given in (
        ("nothing", None),
        ("clamping", 1e3),
        ("ablation", None),
        ("test-time registers", [photograph(0)]),
        ("data-free", None),
        ("SINDER", sound),
        ("hybrid", sound),
    ):
        params, neurons = REMEDIES[name].apply(sound, given)
        jax.tree.map(np.testing.assert_array_equal, params, sound.params)
        assert not neurons.units.size


def test_a_repaired_model_of_another_architecture_is_refused():
    other = Model.of(SMALL["swiglu"], random_params(SMALL["swiglu"]))
    message = error_of(REMEDIES["SINDER"].apply, model(), other)
    assert "different architectures: embed_dim (128 and 64)" in message
