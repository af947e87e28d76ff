"""Holds the float64 reference to the recordings of the authors' code.

What remains between them is the recordings' own float32 rounding; where a tolerance is
wide, the comment beside it says what was measured.
"""

import ast
import dataclasses
import hashlib
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from scipy.special import erf

import golden
import reference
from samples import relative

Arrays = dict[str, np.ndarray]


def setting(name: str) -> tuple[reference.Model, Arrays, dict, reference.Options]:
    """Model, arrays, json and options of a recording."""
    arrays, meta = golden.load(name)
    model = reference.Model.from_golden(arrays, meta)
    return model, arrays, meta, reference.Options(**golden.options(meta))


def recorded_tokens(arrays: Arrays, image: int) -> np.ndarray:
    """[L+1, T, D]: embedded, then after every block."""
    depth = sum(key.startswith("tokens/block_") for key in arrays)
    keys = ["tokens/embedded", *(f"tokens/block_{i}" for i in range(depth))]
    return np.stack([arrays[key][image] for key in keys])


@pytest.fixture(scope="module", params=golden.REPAIRED)
def run(request: pytest.FixtureRequest) -> tuple:
    """A recording and the reference's run over it: name, setting, result."""
    model, arrays, meta, options = setting(request.param)
    directions = arrays["singular_defects"]
    result = reference.repair_run(
        model, arrays["images"], directions, options, meta["steps"]
    )
    return request.param, model, arrays, meta, options, result


# --- The files ------------------------------------------------------------------------


def test_golden_files_match_their_checksums() -> None:
    readme = (golden.FOLDER / "README.md").read_text()
    recorded = dict(re.findall(r"`([\w.]+)` \| `([0-9a-f]{64})`", readme))
    files = [path for path in golden.FOLDER.iterdir() if path.name != "README.md"]
    assert {path.name for path in files} == set(recorded)
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == recorded[path.name]


def test_reference_imports_nothing_it_is_the_yardstick_of() -> None:
    tree = ast.parse(pathlib.Path(reference.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    allowed = {"dataclasses", "collections.abc", "typing"}
    assert modules == allowed | {"numpy", "jaxtyping", "scipy.special"}


# --- Forward pass ---------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.NAMES)
def test_each_block_matches_the_recording(name: str) -> None:
    """Every block gets the recorded input, so one block's rounding is not amplified."""
    model, arrays, _, _ = setting(name)
    for i, image in enumerate(arrays["images"]):
        recorded = recorded_tokens(arrays, i).astype(np.float64)
        assert relative(reference.embed(model, image), recorded[0]) < 1e-6
        for block in range(model.depth):
            after = reference.block_forward(model, block, recorded[block])
            # float32 rounding of one block; measured 1.4e-6 where defects are planted
            assert relative(after, recorded[block + 1]) < 5e-6, block


@pytest.mark.parametrize("name", golden.NAMES)
def test_tokens_and_features_match_the_recording(name: str) -> None:
    model, arrays, _, _ = setting(name)
    registers = slice(1, 1 + model.num_register_tokens)
    for i, image in enumerate(arrays["images"]):
        recorded = recorded_tokens(arrays, i)
        tokens = reference.tokens_after_every_block(model, image)
        for stage, (ours, theirs) in enumerate(zip(tokens, recorded, strict=True)):
            # The planted FFNs amplify rounding: in `moving`, from the third one on
            # (block 8), PyTorch's own float32 and float64 differ by 1.7e-5.
            tolerance = 5e-5 if name == "moving" and stage >= 9 else 1e-5
            assert relative(ours, theirs) < tolerance, stage
        normalized = reference.features(model, image)
        tolerance = 5e-5 if name == "moving" else 1e-5
        patches = normalized[registers.stop :]
        assert relative(patches, arrays["features/x_norm_patchtokens"][i]) < tolerance
        assert relative(normalized[0], arrays["features/x_norm_clstoken"][i]) < 1e-5
        if model.num_register_tokens:
            recorded_registers = arrays["features/x_norm_regtokens"][i]
            assert relative(normalized[registers], recorded_registers) < 1e-5


def test_tokens_of_another_image_do_not_match() -> None:
    """Negative control of the two tests above."""
    model, arrays, _, _ = setting("registers")
    tokens = reference.tokens_after_every_block(model, arrays["images"][1])
    for ours, theirs in zip(tokens, recorded_tokens(arrays, 0), strict=True):
        assert relative(ours, theirs) > 0.1


@pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 4), (5, 8), (7, 2), (16, 11)])
def test_position_resize_matches_pytorch(
    antialias: bool, offset: float, shape: tuple[int, int]
) -> None:
    """A stored 5 x 5 or 7 x 7 grid: grown, shrunk, one axis of unchanged length."""
    torch = pytest.importorskip("torch")
    for stored in (5, 7):
        grid = np.random.default_rng(stored).standard_normal((stored, stored))
        size: dict[str, Any] = {"size": shape}
        if offset:
            size = {"scale_factor": tuple((n + offset) / stored for n in shape)}
        expected = torch.nn.functional.interpolate(
            torch.tensor(grid)[None, None], mode="bicubic", antialias=antialias, **size
        )
        rows, columns = (
            reference.resize_weights(stored, n, offset=offset, antialias=antialias)
            for n in shape
        )
        # float64 on both sides
        np.testing.assert_allclose(
            rows @ grid @ columns.T, expected[0, 0].numpy(), atol=1e-12
        )


def test_position_grid_of_the_stored_shape_is_untouched() -> None:
    model, arrays, _, _ = setting("native")
    np.testing.assert_array_equal(
        reference.position_embedding(model, 5, 5), arrays["state/pos_embed"][0]
    )


# --- Linear maps and directions -------------------------------------------------------


@pytest.mark.parametrize("name", ["swiglu", "moving"])
def test_attention_maps_match_the_recording(name: str) -> None:
    model, arrays, _, _ = setting(name)
    for block in range(model.depth):  # entries of order 1 in float32, 1.6e-7 measured
        a, b = arrays[f"linear/attn_A_{block}"], arrays[f"linear/attn_b_{block}"]
        ours = reference.attention_map(model, block)
        np.testing.assert_allclose(ours, a, rtol=0, atol=1e-6)
        ours = reference.attention_offset(model, block)
        np.testing.assert_allclose(ours, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_exact_directions_match_the_recorded_fits(name: str) -> None:
    model, arrays, _, _ = setting(name)
    directions = reference.singular_defect_directions(model)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-12)
    cosines = np.abs((directions * arrays["singular_defects"]).sum(1))
    # the recordings are fits to random probes; 0.9996 measured in the worst block
    assert cosines.min() > 0.999


def test_directions_survive_a_product_beyond_float64() -> None:
    """Eight maps of norm 1e60 and more; each has to be rescaled on the way."""
    model, _, _, _ = setting("swiglu")
    state = {k: v * 1e60 if "mlp.w3.w" in k else v for k, v in model.state.items()}
    model = dataclasses.replace(model, state=state)
    directions = reference.singular_defect_directions(model)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-12)


def test_gelu_fit_matches_the_closed_form() -> None:
    """Phi(t) + phi(t) b / (1 + v)^(3/2) times w, v = |w|^2, t = b / sqrt(1 + v)."""
    model, arrays, _, _ = setting("gelu")
    weight = arrays["state/blocks.1.mlp.fc1.weight"].astype(np.float64)
    bias = arrays["state/blocks.1.mlp.fc1.bias"].astype(np.float64)
    v = (weight**2).sum(1)
    t = bias / np.sqrt(1 + v)
    slope = (1 + erf(t / np.sqrt(2))) / 2
    slope += np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi) * bias / (1 + v) ** 1.5
    fit = reference.hidden_fit(model, 1)
    np.testing.assert_allclose(fit, slope[:, None] * weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_monte_carlo_fit_approaches_the_exact_one(name: str) -> None:
    """16 times the probes, a quarter of the error; a wrong integral would stop that."""
    model, _, _, _ = setting(name)
    exact = reference.hidden_fit(model, 3)
    rng = np.random.default_rng(0)
    few, many = (
        relative(reference.hidden_fit_monte_carlo(model, 3, rng, probes), exact)
        for probes in (5_000, 80_000)
    )
    # 3.7 to 4.2 over blocks and seeds; the planted units make SwiGLU's error 0.07
    assert 3.5 < few / many < 4.5
    assert many < 0.1


def test_swiglu_fit_of_a_constant_gate_is_linear_in_the_other_half() -> None:
    """w1 = 0: h = silu(b1) (w2 x + b2), whose fit is silu(b1) w2."""
    model, arrays, _, _ = setting("swiglu")
    state = dict(model.state)
    key = "blocks.0.mlp.w12.weight"
    state[key] = state[key].copy()
    state[key][7] = 0
    fit = reference.hidden_fit(dataclasses.replace(model, state=state), 0)
    gate = float(arrays["state/blocks.0.mlp.w12.bias"][7])
    silu = gate / (1 + np.exp(-gate))
    hidden_width = len(fit)
    # the trapezoidal sum of the normal density is 1 to rounding
    np.testing.assert_allclose(fit[7], silu * state[key][hidden_width + 7], rtol=1e-12)


# --- Outliers, target, loss -----------------------------------------------------------


def test_threshold_uses_the_sample_standard_deviation() -> None:
    """One -1 among eight 0 lies 2.667 deviations below the mean (2.828 with ddof=0)."""
    logits = np.zeros((3, 3))
    logits[1, 1] = -1
    assert reference.outlier_mask(logits, mask_thr=2.6, window=3).sum() == 1
    assert reference.outlier_mask(logits, mask_thr=2.7, window=3).sum() == 0


@pytest.mark.parametrize("window", [3, 5])
def test_border_tokens_are_never_outliers_but_count(window: int) -> None:
    logits = np.zeros((9, 9))
    border = window // 2
    logits[border - 1, 4] = logits[4, 9 - border] = logits[4, 4] = -1
    mask = reference.outlier_mask(logits, mask_thr=4.0, window=window)
    assert np.argwhere(mask).tolist() == [[4, 4]]
    logits[border - 1] = logits[:, border - 1] = -1  # raises the deviation
    assert not reference.outlier_mask(logits, mask_thr=4.0, window=window).any()


def test_cosine_of_a_zero_direction_or_token_is_zero() -> None:
    patches = np.random.default_rng(0).standard_normal((4, 4, 8))
    assert not reference.outlier_logits(patches, np.zeros(8)).any()
    patches[1, 2] = 0
    logits = reference.outlier_logits(patches, patches[0, 0])
    assert logits[1, 2] == 0
    assert np.isclose(logits[0, 0], -1)


@pytest.mark.parametrize("window", [3, 5])
def test_target_survives_a_small_temperature(window: int) -> None:
    """At tau = 1e-4 plain exponentials underflow; the target is then one neighbor."""
    patches = np.random.default_rng(1).standard_normal((6, 7, 8))
    logits = reference.outlier_logits(patches, np.ones(8))
    rule = {"window": window, "temperature": 1e-4}
    target = reference.neighbor_target(patches, logits, **rule)
    border = window // 2
    inside = target[border:-border, border:-border]
    assert np.isnan(target).sum() == target.size - inside.size
    around = patches[: 2 * border + 1, : 2 * border + 1].reshape(-1, 8)
    near = logits[: 2 * border + 1, : 2 * border + 1].argmax()
    # the runner-up's logit is over 1e-3 lower: a weight below exp(-10) times 6.8
    np.testing.assert_allclose(inside[0, 0], around[near], atol=1e-3)


@pytest.mark.parametrize("window", [3, 5])
def test_target_of_equal_logits_is_the_gaussian_blur(window: int) -> None:
    """One unit vector per patch of the window: the target is the list of weights."""
    integers = {
        3: [1, 2, 1, 2, 4, 2, 1, 2, 1],
        5: [1, 4, 7, 4, 1, 4, 16, 26, 16, 4, 7, 26, 41]
        + [26, 7, 4, 16, 26, 16, 4, 1, 4, 7, 4, 1],
    }[window]
    patches = np.eye(window**2).reshape(window, window, -1)
    logits = np.full((window, window), -0.3)
    rule = {"window": window, "temperature": 0.1}
    target = reference.neighbor_target(patches, logits, **rule)
    expected = np.array(integers) / {3: 16, 5: 273}[window]
    np.testing.assert_allclose(target[window // 2, window // 2], expected, rtol=1e-12)


def test_image_without_outliers_has_zero_loss_and_gradient() -> None:
    patches = np.ones((5, 5, 4))
    result = reference.neighbor_loss(patches, np.ones(4))
    assert (result.loss, result.alpha, result.mask.any()) == (0.0, 2.0, False)
    assert not reference.neighbor_loss_backward(patches, result).any()


def test_masks_targets_loss_and_alpha_match_the_recording(run: tuple) -> None:
    name, _, arrays, meta, options, result = run
    border = options.window // 2
    for step in golden.detailed_steps(arrays):
        entry, recorded = result.log[step], meta["log"][step]
        np.testing.assert_array_equal(entry.details.mask, arrays[f"step{step}/mask"])
        rows, columns = np.nonzero(entry.details.mask)
        np.testing.assert_array_equal(rows, arrays[f"step{step}/rows"])
        np.testing.assert_array_equal(columns, arrays[f"step{step}/cols"])
        inside = entry.details.target[border:-border, border:-border]
        # Weights exp(logit / 0.1) amplify rounding tenfold. In `moving`, block 5,
        # rebuilding kernels from a float32 SVD moves PyTorch's own target by 3e-4.
        tolerance = 5e-4 if name == "moving" else 5e-5
        assert relative(inside, arrays[f"step{step}/target"]) < tolerance
        assert entry.loss == pytest.approx(recorded["loss"], rel=5e-5)  # same reason
        assert entry.alpha == pytest.approx(recorded["alpha"], rel=5e-6)


# --- Factors and gradients ------------------------------------------------------------


@pytest.mark.parametrize("name", golden.REPAIRED)
def test_factors_rebuild_the_kernels_and_match_recorded_sigma(name: str) -> None:
    model, arrays, _, _ = setting(name)
    factors = reference.factorize(model)
    for kernel in reference.trainable_kernels(model):
        for block in range(model.depth):
            u, v = factors.u[kernel][block], factors.v[kernel][block]
            sigma = factors.sigma[kernel][block]
            key, rows = reference.kernel_place(model, block, kernel)
            identity = np.eye(len(sigma))
            np.testing.assert_allclose(u.T @ u, identity, atol=1e-13)
            np.testing.assert_allclose(v.T @ v, identity, atol=1e-13)
            # float64 rounding; 1.03e-14 measured on two threads
            assert relative((u * sigma) @ v.T, model.state[key][rows]) < 1e-13
            recorded = arrays[golden.sigma_name(block, kernel)]
            # a float32 SVD is exact to a few 1e-7 of the largest singular value
            np.testing.assert_allclose(sigma, recorded, rtol=0, atol=3e-6 * sigma[0])


def test_merging_zero_epsilon_changes_no_bit() -> None:
    model, _, _, _ = setting("swiglu")
    factors = reference.factorize(model)
    eps = reference.zero_epsilon(factors)
    eps["mlp/w3"][2] = 0.1
    merged = reference.merge(model, factors, eps)
    changed = [k for k, v in merged.state.items() if (v != model.state[k]).any()]
    assert changed and all(key.startswith("blocks.2.") for key in changed)


def test_epsilon_gradients_match_the_recording(run: tuple) -> None:
    """All blocks up to the defect, active or not."""
    _, model, arrays, meta, _, result = run
    for step in golden.detailed_steps(arrays):
        entry = result.log[step]
        recorded = golden.stacked(arrays, meta, f"step{step}/grad_full")
        for kernel, grads in entry.grads.items():
            assert not grads[entry.layer + 1 :].any()
            for block in range(entry.layer + 1):
                # float32 singular vectors of close values turn; 1.4e-4 measured
                assert relative(grads[block], recorded[kernel][block]) < 5e-4


def shifted_loss(
    model: reference.Model,
    factors: reference.Factors,
    image: np.ndarray,
    eps: Arrays,
    entry: reference.ImageResult,
) -> float:
    """The loss with mask, target and alpha held at `entry`, which carry no gradient."""
    merged = reference.merge(model, factors, eps)
    tokens = reference.embed(merged, image)
    for block in range(entry.layer + 1):
        tokens = reference.block_forward(merged, block, tokens)
    shape = reference.grid_shape(merged, image)
    patches = reference.patch_grid(merged, tokens, shape)
    mask, target = entry.details.mask, entry.details.target
    distances = np.linalg.norm((patches - target)[mask], axis=-1)
    return distances.mean() / entry.alpha


@pytest.mark.parametrize("name", ["swiglu", "gelu", "moving", "registers"])
def test_epsilon_gradients_match_central_differences(name: str) -> None:
    """A random step in one block's epsilon of one kernel at a time, away from zero."""
    model, arrays, _, options = setting(name)
    image = arrays["images"][0]
    factors = reference.factorize(model)
    rng = np.random.default_rng(0)
    eps = {k: 0.01 * rng.standard_normal(s.shape) for k, s in factors.sigma.items()}
    directions = reference.singular_defect_directions(model)
    if name == "registers":  # nothing planted: lower the bar, and look late
        options = reference.Options(mask_thr=1.8, min_outliers=1)
        directions[:2] = 0
    merged = reference.merge(model, factors, eps)
    entry = reference.image_result(merged, factors, image, 0, directions, options)
    assert entry.layer >= 2
    size = 1e-5
    for kernel in eps:
        for block in range(entry.layer + 1):
            step = rng.standard_normal(eps[kernel][block].shape)
            losses = []
            for sign in (1, -1):
                moved = {k: value.copy() for k, value in eps.items()}
                moved[kernel][block] += sign * size * step
                losses.append(shifted_loss(model, factors, image, moved, entry))
            slope = (losses[0] - losses[1]) / (2 * size)
            expected = entry.grads[kernel][block] @ step
            scale = np.linalg.norm(entry.grads[kernel][block])
            # differences of order size^2, and float64 rounding over size: 1e-10 / scale
            assert abs(slope - expected) < 1e-6 * scale + 1e-9, (kernel, block)


# --- Whole runs -----------------------------------------------------------------------


def test_run_meets_the_recorded_defects_at_every_step(run: tuple) -> None:
    _, _, _, meta, _, result = run
    assert len(result.log) == meta["steps"] == len(meta["log"])
    for entry, recorded in zip(result.log, meta["log"], strict=True):
        assert entry.finite
        if recorded["layer"] is None:
            assert (entry.layer, entry.num_outliers) == (-1, 0)
            assert np.isnan(entry.loss)
            continue
        assert entry.layer == recorded["layer"]
        assert entry.num_outliers == recorded["num_defective"]
        assert entry.loss == pytest.approx(recorded["loss"], rel=5e-5)
        assert entry.alpha == pytest.approx(recorded["alpha"], rel=1e-5)


def test_run_updates_the_recorded_kernels(run: tuple) -> None:
    _, model, _, meta, options, result = run
    for entry, recorded in zip(result.log, meta["log"], strict=True):
        if entry.layer >= 0:
            names = [
                golden.epsilon_name(block, kernel)
                for block in reference.active_range(entry.layer, options)
                for kernel in reference.trainable_kernels(model)
            ]
            assert sorted(names) == recorded["updated"]


def test_run_ends_at_the_recorded_epsilon_and_kernels(run: tuple) -> None:
    _, model, arrays, meta, _, result = run
    recorded = golden.stacked(arrays, meta, "final_epsilon")
    for kernel, eps in result.eps.items():
        for block in range(model.depth):
            if not recorded[kernel][block].any():
                assert not eps[block].any()
                continue
            # float32 singular vectors of close values turn; 1.4e-4 measured
            assert relative(eps[block], recorded[kernel][block]) < 1e-3
    merged = reference.merge(model, reference.factorize(model), result.eps)
    kernels = golden.state(arrays, "merged")
    assert set(kernels) == set(merged.state)
    for key, kernel in kernels.items():  # rebuilt in float32; 2.5e-6 measured
        assert relative(merged.state[key], kernel) < 1e-5


def test_inactive_blocks_keep_epsilon_and_momentum() -> None:
    """`moving`: step 0 trains blocks 2-5, step 1 blocks 0-2, step 4 again 2-5."""
    model, arrays, _, options = setting("moving")
    images, directions = arrays["images"], arrays["singular_defects"]
    one, two, three = (
        reference.repair_run(model, images, directions, options, steps)
        for steps in (1, 2, 5)
    )
    for kernel in one.eps:
        for before, after in ((one.eps, two.eps), (one.momentum, two.momentum)):
            changed = (before[kernel] != after[kernel]).any(axis=1)
            assert np.flatnonzero(changed).tolist() == [0, 1, 2]
        grad = three.log[4].grads[kernel][3:6]
        expected = 0.9 * one.momentum[kernel][3:6] + grad  # as step 0 left it
        np.testing.assert_array_equal(three.momentum[kernel][3:6], expected)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_two_images_per_step_reduce_where_their_windows_overlap(reduce: str) -> None:
    """`moving`: image 0 trains blocks 2-5, image 1 blocks 0-2; block 2 is in both."""
    model, arrays, _, options = setting("moving")
    options = dataclasses.replace(options, reduce=reduce)
    images, directions = arrays["images"], arrays["singular_defects"]
    run = reference.repair_run(model, images, directions, options, 1, images_per_step=2)
    assert [entry.layer for entry in run.log] == [5, 2]
    for kernel, eps in run.eps.items():
        first, second = (entry.grads[kernel] for entry in run.log)
        share = 0.5 if reduce == "mean" else 1.0
        expected = np.zeros_like(eps)
        expected[:2] = second[:2]
        expected[2] = share * (first[2] + second[2])
        expected[3:6] = first[3:6]
        np.testing.assert_allclose(eps, -options.lr * expected, rtol=1e-14)
        np.testing.assert_allclose(run.momentum[kernel], expected, rtol=1e-14)


def test_all_blocks_up_to_the_defect_are_active_without_a_limit() -> None:
    options = reference.Options(active_blocks=None)
    assert list(reference.active_range(3, options)) == [0, 1, 2, 3]
    assert list(reference.active_range(12, reference.Options())) == list(range(3, 13))


def test_non_finite_image_changes_nothing_and_counts_as_defective() -> None:
    """Temperature 0 makes every target, and so the loss, not a number."""
    model, arrays, _, options = setting("gelu")
    options = dataclasses.replace(options, temperature=0.0)
    images, directions = arrays["images"][:1], arrays["singular_defects"]
    run = reference.repair_run(model, images, directions, options, 2)
    for entry in run.log:
        assert (entry.layer, entry.finite, entry.skipped) == (2, False, False)
    assert not any(eps.any() for eps in run.eps.values())
    assert not any(momentum.any() for momentum in run.momentum.values())


def test_run_stops_when_most_recent_images_had_no_defect() -> None:
    """`gelu` has defects in images 0, 4, 8: after image 3, three of four had none."""
    model, arrays, _, options = setting("gelu")
    images, directions = arrays["images"], arrays["singular_defects"]
    for history, length in ((4, 4), (8, 8), (1_000, 12)):
        run = reference.repair_run(
            model, images, directions, options, 12, history=history
        )
        assert len(run.log) == length
    # Every other image defective until step 6. After step 5 three had none, but not
    # three of the last four.
    run = reference.repair_run(model, images[:2], directions, options, 9, history=4)
    assert [entry.layer for entry in run.log] == [2, -1, 2, -1, 2, -1, -1]
