"""The position embedding's resampling, held to PyTorch's own and to the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from samples import relative
from sinder_jax import pos_embed

CONVENTIONS = {
    "plain": {"antialias": False, "offset": 0.1},
    "registers": {"antialias": True, "offset": 0.0},
    "sinder": {"antialias": True, "offset": 0.1},
    "neither": {"antialias": False, "offset": 0.0},
}
GRIDS = {
    # stored side, rows, columns
    "growing": (5, 12, 12),
    "shrinking": (16, 7, 7),
    "rows-grow-columns-shrink": (9, 20, 4),
    "rows-unchanged": (8, 8, 13),
    "columns-unchanged": (8, 5, 8),
    "hub-to-448x896": (37, 32, 64),
    "one-row": (12, 1, 9),
    "one-patch": (12, 1, 1),
    "one-stored-patch": (1, 3, 2),
}

each_convention = pytest.mark.parametrize("convention", CONVENTIONS)
each_grid = pytest.mark.parametrize("grid", GRIDS)


def random_grid(stored, width=8):
    rng = np.random.default_rng(stored)
    return rng.standard_normal((stored, stored, width)).astype(np.float32)


def resampled(stored_grid, rows, columns, convention):
    """The same by the weights alone, in float64."""
    options = CONVENTIONS[convention]
    left, right = (
        pos_embed.resize_weights(len(stored_grid), size, **options)
        for size in (rows, columns)
    )
    grid = stored_grid.astype(np.float64)
    return np.einsum("hm,wn,mnd->hwd", left, right, grid, optimize=True)


def torch_resampled(stored_grid, rows, columns, *, antialias, offset):
    """As DINOv2's `interpolate_pos_encoding` calls PyTorch: a scale with the offset."""
    torch = pytest.importorskip("torch")
    stored = len(stored_grid)
    size = {"size": (rows, columns)}
    if offset:
        scale = tuple((side + offset) / stored for side in (rows, columns))
        size = {"scale_factor": scale}
    grid = torch.nn.functional.interpolate(
        torch.from_numpy(stored_grid).permute(2, 0, 1)[None],
        mode="bicubic",
        antialias=antialias,
        **size,
    )
    assert grid.shape[2:] == (rows, columns)
    return grid[0].permute(1, 2, 0).numpy()


@each_convention
@each_grid
def test_resampling_matches_pytorch(grid, convention):
    stored, rows, columns = GRIDS[grid]
    values, options = random_grid(stored), CONVENTIONS[convention]
    expected = torch_resampled(values.astype(np.float64), rows, columns, **options)
    # float64 on both sides
    assert relative(resampled(values, rows, columns, convention), expected) < 1e-13
    ours = pos_embed.resample(jnp.asarray(values), rows, columns, **options)
    assert ours.dtype == jnp.float32
    # weights rounded to float32 and sums of up to 12 · 12 products of them
    assert relative(ours, expected) < 1e-6
    # PyTorch's float32 antialiasing computes its weights in float32: 1e-6 more
    theirs = torch_resampled(values, rows, columns, **options)
    assert relative(ours, theirs) < 3e-6


@each_convention
@each_grid
def test_weights_match_the_reference(grid, convention):
    stored, rows, columns = GRIDS[grid]
    for size in (rows, columns):
        weights = pos_embed.resize_weights(stored, size, **CONVENTIONS[convention])
        expected = reference.resize_weights(stored, size, **CONVENTIONS[convention])
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-14)
        # the cubic's own taps sum to one up to rounding, also without normalization
        np.testing.assert_allclose(weights.sum(1), 1.0, rtol=0, atol=1e-14)


@each_convention
def test_stored_grid_is_used_untouched(convention):
    """Also with an offset, which alone would move every row by up to a 0.02th."""
    values = jnp.asarray(random_grid(7))
    same = pos_embed.resample(values, 7, 7, **CONVENTIONS[convention])
    assert np.asarray(same).tobytes() == np.asarray(values).tobytes()


def test_unchanged_axis_is_copied_with_antialias_only():
    values = random_grid(8)
    for convention, options in CONVENTIONS.items():
        weights = pos_embed.resize_weights(8, 8, **options)
        # without offset, position j is j itself: the kernel is 1 there, 0 beside
        copied = convention != "plain"
        assert np.array_equal(weights, np.eye(8)) == copied
    moved = resampled(values, 8, 13, "plain") - resampled(values, 8, 13, "neither")
    assert np.abs(moved).max() > 1e-2


def test_conventions_differ_from_each_other():
    """What a test of one of them alone would not notice."""
    values = random_grid(16)
    results = [resampled(values, 7, 7, convention) for convention in CONVENTIONS]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert relative(one, other) > 5e-3


@each_convention
@pytest.mark.parametrize("grid", ["growing", "shrinking", "one-row"])
def test_jax_image_resize_is_equal_in_the_register_convention_only(grid, convention):
    """The negative control: elsewhere the obvious one-liner is off by per cents."""
    stored, rows, columns = GRIDS[grid]
    values, antialias = random_grid(stored), CONVENTIONS[convention]["antialias"]
    theirs = jax.image.resize(
        values, (rows, columns, values.shape[2]), "bicubic", antialias=antialias
    )
    distance = relative(theirs, resampled(values, rows, columns, convention))
    if convention == "registers":
        assert distance < 3e-6  # two float32 programs
    else:
        assert distance > 0.01


def test_resampling_is_linear_and_differentiable():
    """Zeros and ones stay so, and the gradient is the transposed map."""
    options = CONVENTIONS["sinder"]
    ones = pos_embed.resample(jnp.ones((5, 5, 2)), 12, 9, **options)
    np.testing.assert_allclose(ones, 1.0, rtol=1e-6)  # float32 rounding of the weights

    def total(grid):
        return jnp.sum(pos_embed.resample(grid, 12, 9, **options))

    gradient = jax.grad(total)(jnp.ones((5, 5, 2)))
    rows, columns = (pos_embed.resize_weights(5, n, **options).sum(0) for n in (12, 9))
    expected = np.outer(rows, columns)[:, :, None] * np.ones(2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
