"""Outliers, target and neighbor loss: recordings, the reference, and edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import golden
import reference
from samples import relative
from sinder_jax import factor, loss, vit

WINDOWS = (3, 5)


@functools.partial(jax.jit, static_argnames=("mask_thr", "window", "temperature"))
def loss_and_gradients(tokens, direction, **options):
    """((loss, aux), (∂loss/∂tokens, ∂loss/∂direction))."""

    def loss_of(tokens, direction):
        return loss.neighbor_loss(tokens, direction, **options)

    return jax.value_and_grad(loss_of, (0, 1), has_aux=True)(tokens, direction)


def loss_and_gradient(tokens, direction, **options):
    """((loss, aux), ∂loss/∂tokens); a direction never gets a gradient."""
    result, (by_tokens, by_direction) = loss_and_gradients(tokens, direction, **options)
    assert not by_direction.any()
    return result, by_tokens


def unit(vector):
    return vector / np.linalg.norm(vector)


def planted(height=11, width=9, dim=16, places=((3, 3), (5, 4), (8, 6)), size=8.0):
    """Random tokens [H, W, D], those at `places` thrown along a direction [D]."""
    rng = np.random.default_rng(height + 100 * width)
    tokens = rng.standard_normal((height, width, dim))
    direction = unit(rng.standard_normal(dim))
    # The others keep a small component along it, so that cosines differ.
    tokens -= 0.8 * (tokens @ direction)[..., None] * direction
    for row, column in places:
        tokens[row, column] += size * direction
    return tokens.astype(np.float32), direction.astype(np.float32)


# --- Against the recordings -----------------------------------------------------------


def model_of_step(name, step):
    """The recorded model as it was before a step, repaired by the ones before.

    Until the second recorded step only the first one has changed it, so that ε follows
    from the recorded gradients of that one.
    """
    arrays, meta = golden.load(name)
    first, *_ = golden.detailed_steps(arrays)
    config, params = convert.from_torch(
        golden.state(arrays),
        num_heads=meta["num_heads"],
        interpolate_antialias=meta["interpolate_antialias"],
        interpolate_offset=meta["interpolate_offset"],
    )
    assert all(entry["layer"] is None for entry in meta["log"][first + 1 : step])
    gradients = golden.stacked(arrays, meta, f"step{first}/grad_full")
    end = meta["log"][first]["layer"] + 1
    active = slice(max(0, end - meta["limit_layers"]), end)
    eps = {kernel: np.zeros_like(g) for kernel, g in gradients.items()}
    for kernel, gradient in gradients.items():
        eps[kernel][active] = -np.float32(meta["lr"]) * gradient[active]
    return config, factor.merge(params, factor.factorize(config, params), eps)


def tokens_of_step(name, step):
    """Patch tokens [H, W, D] after the block in which a step found the defect.

    Recorded ones where the model was still as it came, computed ones later.
    """
    arrays, meta = golden.load(name)
    number, block = step % len(arrays["images"]), meta["log"][step]["layer"]
    image = np.moveaxis(arrays["images"][number], 0, -1)
    grid = (image.shape[0] // 14, image.shape[1] // 14)
    if step == golden.detailed_steps(arrays)[0]:
        tokens = arrays[f"tokens/block_{block}"][number]
    else:
        config, params = model_of_step(name, step)
        run = functools.partial(vit.ViT(config).apply, method="intermediates")
        run = jax.jit(run, static_argnames="blocks")
        tokens = run({"params": params}, image[None], blocks=(block,))[0][0]
    return tokens[1:].reshape(*grid, -1)


RECORDED_STEPS = [
    (name, step)
    for name in golden.REPAIRED
    for step in golden.detailed_steps(golden.load(name)[0])
]


@pytest.mark.parametrize(("name", "step"), RECORDED_STEPS)
def test_loss_matches_the_recording(name, step):
    arrays, meta = golden.load(name)
    entry = meta["log"][step]
    block, window = entry["layer"], meta["kernel"]
    (value, aux), _ = loss_and_gradient(
        tokens_of_step(name, step),
        arrays["singular_defects"][block],
        mask_thr=meta["mask_thr"],
        window=window,
    )
    np.testing.assert_array_equal(aux.mask, arrays[f"step{step}/mask"])
    rows, columns = np.nonzero(aux.mask)
    np.testing.assert_array_equal(rows, arrays[f"step{step}/rows"])
    np.testing.assert_array_equal(columns, arrays[f"step{step}/cols"])
    inside = aux.target[window // 2 : -(window // 2), window // 2 : -(window // 2)]
    # In block 5 of `moving` the authors' own target moves by 3e-4 when the kernels are
    # rebuilt from another float32 SVD; 1.1e-4 measured there, 2.5e-5 elsewhere.
    tolerance = 3e-4 if (name, block) == ("moving", 5) else 1e-4
    assert relative(inside, arrays[f"step{step}/target"]) < tolerance
    assert float(value) == pytest.approx(entry["loss"], rel=1e-4)
    assert float(aux.alpha) == pytest.approx(entry["alpha"], rel=1e-5)


def test_another_image_or_block_does_not_match_the_recording():
    """The negative control of the test above."""
    arrays, meta = golden.load("swiglu")
    block, tokens = meta["log"][0]["layer"], tokens_of_step("swiglu", 0)
    for other_tokens, other_block in ((tokens, block - 1), (tokens[::-1], block)):
        (_, aux), _ = loss_and_gradient(
            other_tokens,
            arrays["singular_defects"][other_block],
            mask_thr=meta["mask_thr"],
            window=meta["kernel"],
        )
        assert not np.array_equal(aux.mask, arrays["step0/mask"])
        target = aux.target[1:-1, 1:-1]
        assert relative(target, arrays["step0/target"]) > 0.01


# --- Against the reference ------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "window", "temperature"),
    [((11, 9), 3, 0.1), ((11, 9), 5, 0.01), ((7, 20), 5, 0.1), ((7, 20), 3, 0.01)],
)
def test_loss_and_gradient_match_the_reference(grid, window, temperature):
    places = ((3, 3), (2, 6)) if grid == (7, 20) else ((3, 3), (5, 4), (8, 6))
    tokens, direction = planted(*grid, places=places)
    options = {"mask_thr": 2.5, "window": window, "temperature": temperature}
    exact = tokens.astype(np.float64)
    expected = reference.neighbor_loss(exact, direction.astype(np.float64), **options)
    gradient = reference.neighbor_loss_backward(exact, expected)
    (value, aux), ours = loss_and_gradient(tokens, direction, **options)
    assert expected.mask.sum() == len(places)
    np.testing.assert_array_equal(aux.mask, expected.mask)
    border = window // 2
    inside = np.s_[border:-border, border:-border]
    # a cosine's float32 rounding, 1e-7, divided by the temperature
    tolerance = 2e-6 * 0.1 / temperature
    assert relative(aux.target[inside], expected.target[inside]) < tolerance
    assert float(aux.alpha) == pytest.approx(expected.alpha, rel=1e-6)
    assert float(value) == pytest.approx(expected.loss, rel=tolerance)
    assert relative(ours, gradient) < tolerance
    assert np.isfinite(aux.target).all()  # the border too, meaningless as it is


@pytest.mark.parametrize("window", WINDOWS)
def test_target_of_a_patch_is_the_weighted_mean_by_hand(window):
    """Written out for one patch, center included, with the Gaussian of the paper."""
    tokens, direction = planted()
    row, column, border = 5, 4, window // 2
    gaussian = {
        3: np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]),
        5: np.array(
            [
                [1, 4, 7, 4, 1],
                [4, 16, 26, 16, 4],
                [7, 26, 41, 26, 7],
                [4, 16, 26, 16, 4],
                [1, 4, 7, 4, 1],
            ]
        ),
    }[window]
    total, weights = np.zeros(16), 0.0
    for i in range(-border, border + 1):
        for j in range(-border, border + 1):
            x = tokens[row + i, column + j].astype(np.float64)
            cosine = abs(x @ direction) / np.linalg.norm(x)
            weight = gaussian[border + i, border + j] * np.exp(-cosine / 0.1)
            total, weights = total + weight * x, weights + weight
    (_, aux), _ = loss_and_gradient(tokens, direction, window=window)
    assert relative(aux.target[row, column], total / weights) < 2e-6  # float32
    np.testing.assert_allclose(loss.GAUSSIANS[window], gaussian / gaussian.sum())


# --- The outlier mask -----------------------------------------------------------------


def test_standard_deviation_has_one_degree_of_freedom_less():
    """Of 9 patches one can be (9-1)/√9 = 2.67 deviations off, or √8 = 2.83 without."""
    logits = jnp.zeros((3, 3)).at[1, 1].set(-1.0)
    for mask_thr, detected in ((2.6, True), (2.7, False)):
        mask = loss.outlier_mask(logits, mask_thr=mask_thr, window=3)
        assert bool(mask[1, 1]) == detected
        assert int(mask.sum()) == detected


@pytest.mark.parametrize("window", WINDOWS)
def test_border_tokens_are_never_outliers(window):
    border = window // 2
    for row, column in (
        (0, 4),
        (border - 1, 4),
        (5, border - 1),
        (-border, 4),
        (5, -1),
    ):
        tokens, direction = planted(places=[(row, column)])
        (value, aux), _ = loss_and_gradient(tokens, direction, window=window)
        assert not aux.mask.any() and value == 0
    tokens, direction = planted(places=[(border, border)])
    (_, aux), _ = loss_and_gradient(tokens, direction, window=window)
    assert np.argwhere(aux.mask).tolist() == [[border, border]]


def test_border_counts_in_the_statistics():
    """An outlier of the interior alone is none beside four others on the border."""
    logits = np.zeros((8, 8), np.float32)
    logits[4, 4] = -1
    alone = loss.outlier_mask(jnp.asarray(logits), mask_thr=4.0, window=3)
    assert np.argwhere(alone).tolist() == [[4, 4]]
    logits[0, [1, 3, 5, 7]] = -1
    among = loss.outlier_mask(jnp.asarray(logits), mask_thr=4.0, window=3)
    assert not among.any()


def test_sign_and_length_of_the_direction_do_not_matter():
    tokens, direction = planted()
    (value, aux), _ = loss_and_gradient(tokens, direction)
    assert aux.mask.sum() == 3
    for scale in (-1.0, 1e-3, -300.0):
        scaled = np.float32(scale) * direction
        (other, other_aux), _ = loss_and_gradient(tokens, scaled)
        np.testing.assert_array_equal(aux.mask, other_aux.mask)
        # float32 rounding of the normalized direction, over the temperature
        assert float(other) == pytest.approx(float(value), rel=2e-6)
        assert relative(other_aux.target, aux.target) < 2e-6


def test_zero_direction_detects_nothing():
    tokens, direction = planted()
    (value, aux), gradient = loss_and_gradient(tokens, 0 * direction)
    assert value == 0 and not aux.mask.any() and not gradient.any()
    assert np.isfinite(aux.target).all()
    np.testing.assert_array_equal(loss.normalize(jnp.zeros((2, 5))), np.zeros((2, 5)))


def test_zero_tokens_have_cosine_zero():
    tokens, direction = planted()
    tokens[2, 2] = 0
    logits = loss.outlier_logits(jnp.asarray(tokens), jnp.asarray(direction))
    assert logits[2, 2] == 0 and np.isfinite(logits).all()
    assert logits.min() >= -1 - 1e-6 and logits.max() <= 0


# --- Loss and gradient ----------------------------------------------------------------


def test_without_outliers_loss_and_gradient_are_exactly_zero():
    """Also on the way: nothing divides 0 by 0, not even where it is thrown away."""
    tokens, direction = planted(places=[])
    for grid in (tokens, np.zeros_like(tokens)):
        with jax.debug_nans(True):
            (value, aux), gradient = loss_and_gradient(grid, direction)
        assert not aux.mask.any()
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("shape", "window"), [((1, 1), 3), ((2, 2), 3), ((1, 5), 5), ((4, 4), 5)]
)
def test_grid_without_interior_has_finite_zero_loss(shape, window):
    tokens, direction = planted(*shape, places=[])
    (value, aux), gradient = loss_and_gradient(tokens, direction, window=window)
    assert value == 0 and aux.alpha == 0 and not aux.mask.any()
    assert not gradient.any() and np.isfinite(aux.target).all()


def test_low_temperature_does_not_underflow():
    """Every cosine is 0.9 or more: plain exponentials are exp(-90) and 0 in float32."""
    tokens, direction = planted(places=[(5, 4)], size=30)
    tokens += 10 * direction
    assert np.exp(np.float32(-0.9 / 0.001)) == 0
    for temperature in (0.01, 0.001):
        options = {"mask_thr": 1.5, "temperature": temperature}
        (value, aux), gradient = loss_and_gradient(tokens, direction, **options)
        exact = [x.astype(np.float64) for x in (tokens, direction)]
        logits = reference.outlier_logits(*exact)
        assert logits.max() < -0.8
        target = reference.neighbor_target(
            exact[0], logits, window=3, temperature=temperature
        )
        inside = np.s_[1:-1, 1:-1]
        # a cosine's rounding, 1e-7, over the temperature
        assert relative(aux.target[inside], target[inside]) < 2e-7 / temperature
        assert aux.mask.any() and np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("window", WINDOWS)
def test_gradient_pulls_outliers_towards_a_fixed_target(window):
    """Nothing flows through target, mask and α, nor into other tokens."""
    tokens, direction = planted()
    (_, aux), gradient = loss_and_gradient(tokens, direction, window=window)
    mask = np.asarray(aux.mask)
    assert mask.sum() == 3
    assert not np.asarray(gradient)[~mask].any()
    error = (tokens - aux.target)[mask]
    lengths = np.linalg.norm(error, axis=1, keepdims=True)
    expected = error / lengths / mask.sum() / float(aux.alpha)
    np.testing.assert_allclose(np.asarray(gradient)[mask], expected, rtol=0, atol=1e-6)


def test_token_equal_to_its_target_has_zero_gradient():
    """Constant tokens: every target is its token to the bit, ‖x − target‖ is 0."""
    tokens = jnp.broadcast_to(jnp.asarray([2.0, -1.0, 4.0]), (5, 5, 3))
    mask = jnp.zeros((5, 5), bool).at[2, 1:4].set(True)
    with jax.debug_nans(True):
        (value, aux), gradient = loss_and_gradient(tokens, tokens[0, 0], mask=mask)
    np.testing.assert_array_equal(aux.target[1:-1, 1:-1], tokens[1:-1, 1:-1])
    assert value == 0 and not gradient.any()
    assert float(aux.alpha) == pytest.approx(np.sqrt(21))


def test_given_mask_is_used_in_place_of_detection():
    tokens, direction = planted()
    mask = np.zeros(tokens.shape[:2], bool)
    mask[[2, 6], [5, 2]] = True
    (value, aux), gradient = loss_and_gradient(tokens, direction, mask=mask)
    np.testing.assert_array_equal(aux.mask, mask)
    distances = np.linalg.norm((tokens - aux.target)[mask], axis=1)
    expected = distances.mean() / float(aux.alpha)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert (np.asarray(gradient).any(-1) == mask).all()
    (found, detected), _ = loss_and_gradient(tokens, direction)
    assert not (np.asarray(detected.mask) & mask).any()
    (again, _), _ = loss_and_gradient(tokens, direction, mask=detected.mask)
    # the same mask in another program
    assert float(again) == pytest.approx(float(found), rel=1e-6)


def test_alpha_is_the_mean_norm_of_the_interior():
    tokens, direction = planted()
    tokens[0], tokens[:, -1] = 1e3, 1e3
    for window, border in ((3, 1), (5, 2)):
        (_, aux), _ = loss_and_gradient(tokens, direction, window=window)
        inside = tokens[border:-border, border:-border].astype(np.float64)
        if border == 2:
            assert np.abs(inside).max() < 100
        expected = np.linalg.norm(inside, axis=-1).mean()
        assert float(aux.alpha) == pytest.approx(expected, rel=1e-6)


def test_loss_scales_with_nothing():
    """Tokens ten times as long have the same loss: it is in units of α."""
    tokens, direction = planted()
    (value, _), _ = loss_and_gradient(tokens, direction)
    (scaled, _), _ = loss_and_gradient(10 * tokens, direction)
    assert float(scaled) == pytest.approx(float(value), rel=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window must be 3 or 5 patches, got 4"),
        ({"window": 7}, "window must be 3 or 5 patches, got 7"),
        ({"mask_thr": 0.0}, "mask_thr must be above 0, got 0.0"),
        ({"mask_thr": -4.0}, "mask_thr must be above 0, got -4.0"),
        ({"mask_thr": float("nan")}, "mask_thr must be above 0, got nan"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_option_out_of_range_raises(options, message):
    tokens, direction = planted()
    with pytest.raises(ValueError, match=message):
        loss.neighbor_loss(jnp.asarray(tokens), jnp.asarray(direction), **options)
