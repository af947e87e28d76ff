"""tokens.py: against the float64 reference, by identities, and on planted defects."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import photos
import reference
from recorded import recorded_images, recorded_model, reference_model
from samples import error_of, random_params, relative
from sinder_jax import defects, loss, planted, vit
from sinder_jax.analysis import defective, tokens
from sinder_jax.data import listing

TEMPERATURES = (0.01, 0.1, 1.0)  # of figure 6


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(tokens)
    assert result.attempted >= 17 and result.failed == 0


# --- Tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 4])
def test_last_patches_are_the_tokens_behind_class_and_registers(registers):
    config = vit.ViTConfig(64, 3, 1, "mlp", img_size=56, num_register_tokens=registers)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * x), random_params(config))
    image = np.random.default_rng(3).normal(size=(56, 84, 3)).astype(np.float32)
    patches = tokens.last_patches(config, params, image)
    (every,) = vit.ViT(config).apply(
        {"params": params},
        jnp.asarray(image[None]),
        blocks=(2,),
        method="intermediates",
    )
    assert every.shape == (1, 1 + registers + 24, 64)
    # The same program compiled twice may fuse differently: float32 rounding.
    np.testing.assert_allclose(
        patches, every[0, 1 + registers :].reshape(4, 6, 64), rtol=1e-4, atol=1e-4
    )


# --- Angles ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_angles_match_the_reference(name):
    patches, direction = golden.patches(name)
    got = np.radians(tokens.angles(patches, direction))
    expected = reference.angles(np.float64(patches), np.float64(direction))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    other = reference.angles(np.float64(patches), np.float64(patches[2, 2]))
    assert np.abs(got - other).max() > 0.1  # the control


# --- Empirical direction --------------------------------------------------------------


def images_with_a_direction(noise, seed=0):
    """Four images of 5 x 6 tokens, of which three are long, along one line ± noise."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(4, 5, 6, 32))
    line = rng.normal(size=32)
    line /= np.linalg.norm(line)
    for image in made:
        for row, column in ((1, 1), (2, 4), (4, 0)):
            length = rng.uniform(80, 120) * rng.choice([-1, 1])
            image[row, column] = length * (line + noise * rng.normal(size=32))
    return made.astype(np.float32), line


def test_empirical_direction_finds_the_line_whatever_the_signs():
    made, line = images_with_a_direction(noise=0.01)
    found = tokens.empirical_direction(made)
    # 12 tokens, each 0.01·√32 off
    assert abs(found.direction @ line) > np.cos(0.05)
    flipped = tokens.empirical_direction(made * np.float32(-1))
    assert abs(flipped.direction @ found.direction) > 1 - 1e-6
    long = made[:, [1, 2, 4], [1, 4, 0]].reshape(-1, 32)
    assert np.sum(long / np.linalg.norm(long, axis=1)[:, None] @ found.direction) > 0


def test_empirical_direction_matches_an_eigenvector_in_float64():
    made, _ = images_with_a_direction(noise=0.1)
    found = tokens.empirical_direction(made, count=2)

    def mean_line(rows):
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return np.linalg.eigh(units.T @ units)[1][:, -1]

    longest = []
    for image in np.float64(made).reshape(4, 30, 32):
        order = np.argsort(-np.linalg.norm(image, axis=1))
        longest.append(image[order[:2]])
    lines = np.stack([mean_line(rows) for rows in longest])
    direction = mean_line(np.concatenate(longest))
    assert abs(found.direction @ direction) > 1 - 1e-6
    assert (np.abs(np.sum(found.per_image * lines, axis=1)) > 1 - 1e-6).all()
    degrees = np.degrees(reference.angles(lines, direction))
    np.testing.assert_allclose(found.spread, np.sqrt(np.mean(degrees**2)), rtol=1e-4)
    pairwise = [np.degrees(reference.angles(lines, line)) for line in lines]
    np.testing.assert_allclose(found.pairwise, pairwise, atol=2e-3)
    assert 5 < found.spread < 40


def test_spread_is_zero_where_all_images_agree():
    made, _ = images_with_a_direction(noise=0.0)
    found = tokens.empirical_direction(made)
    assert found.spread < 0.01 and found.pairwise.max() < 0.01


def test_empirical_direction_of_one_token_is_that_token():
    made, _ = images_with_a_direction(noise=0.1)
    one = made[:1]
    longest = one[0].reshape(30, 32)[np.linalg.norm(one, axis=-1).argmax()]
    found = tokens.empirical_direction(one, count=1)
    assert float(tokens.angles(found.direction, longest)) < 1e-3
    for count in (0, 31):
        message = error_of(tokens.empirical_direction, one, count=count)
        assert f"count must be 1 to 30 tokens of an image, got {count}" in message


def test_random_directions_are_unit_seeded_and_uniform():
    found = tokens.random_directions(jax.random.key(0), 2_000, 16)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    again = tokens.random_directions(jax.random.key(0), 2_000, 16)
    np.testing.assert_array_equal(found, again)
    other = tokens.random_directions(jax.random.key(1), 2_000, 16)
    assert not np.array_equal(found, other)
    # Mean 0 and covariance 1/16: sampled to 1/√2,000.
    assert np.abs(np.mean(found, axis=0)).max() < 0.03
    covariance = np.asarray(found.T @ found) / 2_000
    np.testing.assert_allclose(covariance, np.eye(16) / 16, atol=0.01)


# --- Separation -----------------------------------------------------------------------


def test_separation_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (7, 9)).astype(np.float32)  # with many ties
    positives = rng.random((7, 9)) < 0.3
    a, b = values[positives], values[~positives]
    above = (a[:, None] > b[None, :]) + 0.5 * (a[:, None] == b[None, :])
    assert tokens.separation(values, positives) == pytest.approx(above.mean())
    assert tokens.separation(-values, positives) == pytest.approx(1 - above.mean())
    assert 0.2 < above.mean() < 0.8


def test_separation_of_extremes_and_of_nothing():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert tokens.separation(values, values > 2.5) == 1
    assert tokens.separation(values, values < 2.5) == 0
    assert tokens.separation(np.ones(4), values > 2.5) == 0.5
    assert np.isnan(tokens.separation(values, values > 9))
    assert np.isnan(tokens.separation(values, values > 0))


@functools.cache
def planted_tokens():
    """(tokens [images, H, W, D] after the last block, ν, mask by norms)."""
    made = planted.planted_model(1)
    params = jax.device_put(made.params)
    patches = []
    for file in listing.sample_images()[:4]:
        pixels = photos.prepared(file, 224)
        patches.append(np.asarray(tokens.last_patches(made.config, params, pixels)))
    stack = np.stack(patches)
    norms = np.linalg.norm(stack, axis=-1)
    nu = defects.singular_defect_directions(made.config, made.params)[-1]
    return stack, np.asarray(nu), norms > defective.LARGE_NORM * np.median(norms)


def test_nu_tells_defects_apart_and_random_directions_do_not():
    stack, nu, large = planted_tokens()
    assert 12 <= large.sum() <= 4 * planted.NUM_SPOTS
    assert tokens.separation(-tokens.angles(stack, nu), large) > 0.99
    random = tokens.random_directions(jax.random.key(0), 200, stack.shape[-1])
    degrees = jax.lax.map(lambda line: tokens.angles(stack, line), random)
    scores = [tokens.separation(-np.asarray(one), large) for one in degrees]
    assert abs(np.mean(scores) - 0.5) < 0.06
    assert np.std(scores) > 0.1  # a single one may be anything


def test_the_empirical_direction_of_planted_defects_is_the_theoretical_one():
    stack, nu, _ = planted_tokens()
    found = tokens.empirical_direction(stack)
    assert float(tokens.angles(found.direction, nu)) < 15
    assert found.spread < 5


# --- Learning targets -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "window"), [("swiglu", 5), ("gelu", 3)])
def test_targets_match_the_reference_to_the_border(name, window):
    patches, direction = golden.patches(name)
    expected = np.stack(
        [
            reference.learning_targets(
                np.float64(patches), np.float64(direction), window=window, tau=tau
            )
            for tau in TEMPERATURES
        ]
    )
    with jax.enable_x64(True):
        got = tokens.learning_targets(
            np.float64(patches), np.float64(direction), TEMPERATURES, window=window
        )
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, atol=1e-6)
    got = tokens.learning_targets(patches, direction, TEMPERATURES, window=window)
    assert got.dtype == jnp.float32
    # A cosine is rounded to 6e-8, which exp(·/τ) makes 6e-6 at τ = 0.01.
    assert relative(got[0], expected[0]) < 1e-5
    assert relative(got[1:], expected[1:]) < 1e-6
    assert relative(expected[0], expected[1]) > 1e-2  # the control


def test_targets_and_detection_are_those_of_the_loss():
    patches, direction = map(jnp.asarray, golden.patches("swiglu"))
    _, aux = jax.jit(loss.neighbor_loss)(patches, direction)
    target = tokens.learning_targets(patches, direction, [0.1])[0]
    np.testing.assert_allclose(target, aux.target, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(defective.detect(patches, direction).mask, aux.mask)


def test_options_out_of_range_raise():
    patches, direction = golden.patches("swiglu")
    call = functools.partial(error_of, tokens.learning_targets, patches, direction)
    assert "temperature must be above 0, got 0.0" in call((0.1, 0.0))
    assert "window must be 3 or 5 patches, got 4" in call((0.1,), window=4)


# --- Growth ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiglu", "gelu", "registers"])
def test_growth_matches_the_reference_and_adds_up(name):
    config, params = recorded_model(name)
    model, images = reference_model(name), recorded_images(name)
    direction = np.random.default_rng(0).normal(size=config.embed_dim)
    direction /= np.linalg.norm(direction)
    found = tokens.growth(config, params, images, 3 * direction)
    grid = (images.shape[1] // 14, images.shape[2] // 14)
    assert found.attention.shape == (config.depth, len(images), *grid)
    total = found.start + np.sum(found.attention + found.ffn, axis=0)
    largest = np.abs(found.end).max()
    np.testing.assert_allclose(total, found.end, atol=1e-5 * largest)
    assert found.end.ravel()[np.abs(found.end).argmax()] > 0
    flipped = tokens.growth(config, params, images, -direction)
    np.testing.assert_allclose(flipped.end, found.end, atol=1e-5 * largest)

    expected = [
        reference.growth(model, np.moveaxis(image, -1, 0), direction)
        for image in np.float64(images)
    ]
    end = np.stack([one.end for one in expected])[:, 1 + config.num_register_tokens :]
    sign = np.sign(end.ravel()[np.abs(end).argmax()])
    for index, one in enumerate(expected):
        for part in ("start", "attention", "ffn", "end"):
            ours = np.asarray(getattr(found, part))
            ours = ours[:, index] if ours.ndim == 4 else ours[index]
            theirs = getattr(one, part)[..., 1 + config.num_register_tokens :]
            ours = ours.reshape(theirs.shape)
            # Planted FFNs amplify rounding, see test_reference.
            np.testing.assert_allclose(ours, sign * theirs, atol=2e-5 * largest)
    assert np.abs(found.ffn).max() > 0.1 and np.abs(found.attention).max() > 0.01


def test_the_planted_ffn_is_what_makes_a_token_long():
    made = planted.planted_model(1)
    _, nu, defective = planted_tokens()
    pixels = [photos.prepared(file, 224) for file in listing.sample_images()[:1]]
    found = tokens.growth(made.config, made.params, np.stack(pixels), nu)
    thrown = np.asarray(found.ffn)[:, 0][:, defective[0]]
    assert thrown.shape == (made.config.depth, defective[0].sum())
    end = np.asarray(found.end)[0][defective[0]]
    total = np.asarray(found.start)[0][defective[0]]
    total = total + np.asarray(found.attention)[:, 0][:, defective[0]].sum(0)
    np.testing.assert_allclose(total + thrown.sum(0), end, rtol=1e-5)
    assert (thrown[made.block] > 0.8 * end).all() and (end > 0).all()
    others = np.asarray(found.ffn)[made.block, 0][~defective[0]]
    assert np.abs(others).max() < 0.2 * end.min()


def test_growth_refuses_images_that_are_not_whole_patches():
    config, params = recorded_model("swiglu")
    images = recorded_images("swiglu")
    message = error_of(
        tokens.growth, config, params, images[:, :-1], np.ones(config.embed_dim)
    )
    assert "multiples of 14" in message


# --- Compiled -------------------------------------------------------------------------


def test_every_function_gives_the_same_under_jit():
    made, line = images_with_a_direction(noise=0.1)
    line = line.astype(np.float32)
    calls = [
        (tokens.angles, (made, line)),
        (tokens.empirical_direction, (made,)),
        (defective.detect, (made[0], line)),
        (tokens.learning_targets, (made[0], line)),
    ]
    for function, arguments in calls:
        plain = jax.tree.leaves(function(*arguments))
        jitted = jax.tree.leaves(jax.jit(function)(*arguments))
        for got, want in zip(jitted, plain, strict=True):
            np.testing.assert_allclose(
                np.asarray(got, float), np.asarray(want, float), rtol=1e-4, atol=1e-4
            )
