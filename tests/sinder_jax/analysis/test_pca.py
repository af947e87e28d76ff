"""pca.py against NumPy in float64."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.analysis import pca
from sinder_jax.analysis.defective import large_norms, norm_ratio
from sinder_jax.analysis.tokens import (
    angles,
    cosine,
    token_norms,
)


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    """Tokens whose channels differ in spread, so that components are well separated."""
    rng = np.random.default_rng(seed)
    width = shape[-1]
    rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
    spread = 3.0 * 0.7 ** np.arange(width)
    tokens = (rng.normal(size=shape) * spread) @ rotation + rng.normal(size=width)
    return tokens.astype(np.float32)


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(pca)
    assert result.attempted >= 7 and result.failed == 0


# --- Norms ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 5, 6, 48)])
def test_token_norms_match_float64(shape):
    tokens = random_tokens(0, *shape)
    expected = np.sqrt((tokens.astype(np.float64) ** 2).sum(-1))
    got = token_norms(tokens)
    assert got.shape == shape[:-1] and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # a sum of 48 in float32


# --- Angles and cosines ---------------------------------------------------------------


def test_angles_match_float64_and_ignore_lengths_and_signs():
    tokens = random_tokens(1, 6, 5, 48)
    direction = np.random.default_rng(2).normal(size=48).astype(np.float32)
    long = tokens.astype(np.float64)
    cosine = long @ direction.astype(np.float64)
    cosine /= np.linalg.norm(long, axis=-1) * np.linalg.norm(direction.astype(float))
    expected = np.degrees(np.arccos(np.abs(cosine)))
    got = angles(tokens, direction)
    assert got.shape == (6, 5) and 0 <= got.min() and got.max() <= 90
    np.testing.assert_allclose(got, expected, atol=1e-4)  # 1e-6 rad of float32 sums
    for scale in (-1.0, 1e-4, 3e3):
        scaled = angles(tokens, np.float32(scale) * direction)
        np.testing.assert_allclose(scaled, got, atol=1e-4)
        scaled = angles(np.float32(scale) * tokens, direction)
        np.testing.assert_allclose(scaled, got, atol=1e-4)


@pytest.mark.parametrize("degrees", [0.0, 0.001, 0.01, 1.0, 45.0, 89.99, 90.0])
def test_small_angles_are_told_apart(degrees):
    radians = np.radians(degrees)
    token = np.array([np.cos(radians), np.sin(radians), 0], np.float32)
    got = angles(token, np.array([-2, 0, 0], np.float32))
    # Relative where small (an arc cosine would give 0 or 0.02), else float32's eps.
    np.testing.assert_allclose(got, degrees, rtol=1e-5, atol=1e-5)


def test_a_zero_token_or_direction_is_at_right_angles_to_everything():
    tokens = np.array([[0, 0, 0], [1, 2, 3]], np.float32)
    np.testing.assert_array_equal(angles(tokens, np.zeros(3, "f4")), [90, 90])
    assert angles(tokens, np.ones(3, np.float32))[0] == 90
    np.testing.assert_array_equal(cosine(tokens, tokens)[0], 0)


def test_cosine_matches_float64_with_its_sign():
    a, b = random_tokens(3, 4, 5, 48), random_tokens(4, 4, 5, 48)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=-1) * np.linalg.norm(b64, axis=-1)
    expected = (a64 * b64).sum(-1) / norms
    assert expected.min() < 0 < expected.max()
    np.testing.assert_allclose(cosine(a, b), expected, atol=1e-6)
    assert cosine(a, a).max() <= 1.0
    np.testing.assert_allclose(cosine(a, -a), -1.0, atol=1e-6)


# --- Principal components -------------------------------------------------------------


def pca_float64(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and leading components with the sign rule, by NumPy's SVD in float64."""
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    centered = rows - rows.mean(0)
    components = np.linalg.svd(centered, full_matrices=False)[2][:3]
    for component in components:
        coordinates = centered @ component
        component *= np.sign(coordinates[np.abs(coordinates).argmax()])
    return rows.mean(0), components


def test_pca_basis_matches_float64_svd():
    tokens = random_tokens(5, 9, 11, 24)
    basis = pca.pca_basis(tokens)
    mean, components = pca_float64(tokens)
    np.testing.assert_allclose(basis.mean, mean, atol=1e-5)  # a mean of 99 of size 3
    # eps 6e-8 times σ0 over the gap of σ², here about 5; signs included.
    np.testing.assert_allclose(basis.components, components, atol=1e-5)


def test_pca_rgb_matches_float64_and_fills_0_to_255():
    tokens = random_tokens(6, 9, 11, 24)
    mean, components = pca_float64(tokens)
    coordinates = (tokens.astype(np.float64) - mean) @ components.T
    low, high = coordinates.min((0, 1)), coordinates.max((0, 1))
    expected = (coordinates - low) / (high - low) * 255
    got = np.asarray(pca.pca_rgb(tokens))
    assert got.dtype == np.uint8 and got.shape == (9, 11, 3)
    # Half a level of rounding; 0.01 for what float32 moves.
    assert np.abs(got - expected).max() <= 0.51
    np.testing.assert_array_equal(got.min((0, 1)), [0, 0, 0])
    np.testing.assert_array_equal(got.max((0, 1)), [255, 255, 255])


def test_pca_does_not_depend_on_the_sign_lapack_chose(monkeypatch):
    tokens = random_tokens(7, 6, 6, 12)
    expected = pca.pca_rgb(tokens)
    svd = jnp.linalg.svd

    def flipped(matrix, **options):
        u, s, vh = svd(matrix, **options)
        return -u, s, -vh

    monkeypatch.setattr(jnp.linalg, "svd", flipped)
    np.testing.assert_array_equal(pca.pca_rgb(tokens), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_defective_tokens_are_bright(sign):
    tokens = random_tokens(8, 10, 10, 16)
    direction = np.zeros(16, np.float32)
    direction[4] = sign
    tokens[2, 3] += 400 * direction
    tokens[7, 7] += 300 * direction
    red = np.array(pca.pca_rgb(tokens))[..., 0]
    assert red[2, 3] == 255 and red[7, 7] > 180
    red[[2, 7], [3, 7]] = 0
    assert red.max() < 20


def test_a_shared_basis_gives_equal_tokens_equal_colors():
    before = random_tokens(9, 8, 8, 16)
    after = before.copy()
    after[1, 2] = before.mean((0, 1))
    basis = pca.pca_basis(before)
    one, other = pca.pca_rgb(before), pca.pca_rgb(after, basis)
    changed = np.any(np.asarray(one) != np.asarray(other), axis=-1)
    assert changed.sum() == 1 and changed[1, 2]
    # Beyond the range of the basis colors are clipped, not wrapped around.
    far = before + 1e4 * np.asarray(basis.components)[0]
    assert (np.asarray(pca.pca_rgb(far, basis))[..., 0] == 255).all()


def test_a_basis_of_several_images_is_that_of_their_tokens_together():
    tokens = random_tokens(10, 3, 4, 5, 16)
    joint = pca.pca_basis(tokens)
    flat = pca.pca_basis(tokens.reshape(60, 16))
    for one, other in zip(joint, flat, strict=True):
        np.testing.assert_array_equal(one, other)
    assert pca.pca_rgb(tokens, joint).shape == (3, 4, 5, 3)


def test_components_that_are_rounding_noise_stay_black():
    line = np.linspace(-1, 1, 30, dtype=np.float32)[:, None] * random_tokens(11, 16)
    colors = np.asarray(pca.pca_rgb(line))
    assert colors[:, 0].max() == 255 and not colors[:, 1:].any()
    same = np.broadcast_to(random_tokens(12, 16), (4, 4, 16))
    assert not np.asarray(pca.pca_rgb(same)).any()


def test_too_few_tokens_or_channels_raise():
    with pytest.raises(ValueError, match="got 2 of 16"):
        pca.pca_basis(random_tokens(0, 1, 2, 16))
    with pytest.raises(ValueError, match="got 9 of 2"):
        pca.pca_rgb(np.ones((3, 3, 2), np.float32))


def test_every_function_gives_the_same_under_jit():
    tokens = jnp.asarray(random_tokens(13, 5, 6, 12))
    direction = tokens[0, 0]
    norms = token_norms(tokens)
    calls = [
        (token_norms, (tokens,)),
        (norm_ratio, (norms,)),
        (large_norms, (norms,)),
        (angles, (tokens, direction)),
        (cosine, (tokens, -tokens)),
        (pca.pca_rgb, (tokens,)),
    ]
    for function, arguments in calls:
        plain = np.asarray(function(*arguments), np.float64)
        jitted = np.asarray(jax.jit(function)(*arguments), np.float64)
        # Fused sums round differently; one of 255 levels may go the other way.
        atol = 1 if function is pca.pca_rgb else 1e-3
        np.testing.assert_allclose(jitted, plain, rtol=1e-6, atol=atol)
