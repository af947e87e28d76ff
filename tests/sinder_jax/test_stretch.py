"""stretch.py: the objective of a data-free repair, term by term, against float64."""

import functools

import jax
import numpy as np
import pytest

from samples import SMALL, random_params
from sinder_jax import datafree, defects, kernels, stretch, vit

KINDS = SMALL | {"deep": vit.ViTConfig(16, 5, 2, "mlp", img_size=28)}


@functools.cache
def problem(kind="mlp", blocks=(0, 2)):
    """A search over several blocks of a random model, and its problem with all of D."""
    config = KINDS[kind]
    params = jax.tree.map(lambda x: 0.2 * x, random_params(config))
    found = defects.singular_defects(config, params)
    directions = {block: found.directions[block] for block in blocks}
    maps = [defects.block_map(config, params, i) for i in range(config.depth)]
    factors = datafree.factors_of(config, params, blocks)
    with jax.enable_x64(True):
        search = datafree._Search(config, params, directions, factors, maps, 0.0)
        triplets, logs = search.leading(search.sigma, config.embed_dim)
        u, v = (np.stack([getattr(t, side) for t in triplets]) for side in "uv")
        return search, search.problem(u, v, search.ceiling(logs))


def test_a_repair_can_hope_for_the_singular_value_behind_as_many_as_it_changes():
    search, _ = problem()  # of blocks 0 and 2, of three
    logs = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(search.ceiling(logs), [1, 5, 10])


def changed(search, seed=5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(-0.5, 0.5, x.shape), search.sigma)


def test_the_whole_space_gives_the_stretch_of_every_product():
    search, whole = problem()
    with jax.enable_x64(True):
        values = jax.device_get(stretch.singular_values(whole, changed(search)))
        small = stretch.log_stretches(whole, values)
        _, logs = search.leading(values, 1)
    np.testing.assert_allclose(small, logs[:, 0], rtol=0, atol=1e-9)


def test_a_subspace_gives_no_more_than_the_stretch_of_the_product():
    search, whole = problem()
    with jax.enable_x64(True):
        triplets, logs = search.leading(search.sigma, 2)
        u, v = (np.stack([getattr(t, side) for t in triplets]) for side in "uv")
        small = search.problem(u, v, logs[:, 1])
        values = jax.device_get(stretch.singular_values(whole, changed(search)))
        stretches, exact = jax.device_get(
            [stretch.log_stretches(each, values) for each in (small, whole)]
        )
    assert (stretches <= exact + 1e-12).all()
    assert (stretches < exact - 1e-3).any()  # or the test could not fail


def test_gains_are_those_of_the_maps():
    search, whole = problem()
    with jax.enable_x64(True):
        values = jax.device_get(stretch.singular_values(whole, changed(search)))
        got = stretch.gains(whole, values)
        maps = search.changed(values)
    want = [
        np.linalg.norm(maps[b].T @ nu) for b, nu in zip((0, 2), search.nu, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-10)


def reference_map(config, params, block, found, s, nu):
    """A changed block's map from rebuilt kernels: no code of the search, but SciPy."""
    names = kernels.names(config)
    four = [
        (found.u[n][block] * x) @ np.float64(found.v[n][block].T)
        for n, x in zip(names, s, strict=True)
    ]
    before = kernels.weights(config, params, block)
    w = before._replace(**dict(zip(("v", "proj", "first", "last"), four, strict=True)))
    # What the FFN as it was, without LayerNorm's centering, makes of ν: its answer.
    fit = defects.hidden_fit(before.ffn_layer, before.first, before.bias)
    answer = (np.diag(before.gamma2) @ before.last @ fit).T @ nu
    reach = 4.0 * answer / np.linalg.norm(answer)
    covariance = np.eye(len(nu)) + np.outer(reach, reach)
    root = np.linalg.cholesky(covariance)  # x = root·z, z ~ N(0, I)
    slopes = defects.hidden_slopes(w.ffn_layer, w.first @ root, w.bias)
    parts = zip(slopes, np.split(w.first, len(slopes)), strict=True)
    fit = sum(slope[:, None] * rows for slope, rows in parts)
    center = np.eye(len(nu)) - 1 / len(nu)
    ffn = np.diag(w.gamma2) @ w.last @ fit @ np.diag(w.scale2) @ center
    attention = np.diag(w.gamma1) @ w.proj @ w.v @ np.diag(w.scale1) @ center
    return (np.eye(len(nu)) + ffn) @ (np.eye(len(nu)) + attention)


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [("mlp", (0, 2)), ("mlp", (1,)), ("deep", (1, 4)), ("swiglu", (0, 1))],
)
def test_the_objective_is_the_sum_of_its_three_terms(kind, blocks):
    config, price = KINDS[kind], 0.3
    params = jax.tree.map(lambda x: 0.2 * x, random_params(config))
    found = datafree.factors_of(config, params, blocks)
    search, whole = problem(kind, blocks)
    theta = changed(search)
    # Some products and some blocks are stretched less than they may be.
    n = config.depth - blocks[0]
    ceiling = np.asarray(whole.ceiling) - np.where(np.arange(n)[::-1] % 2, -4.0, 1.0)
    maps = [defects.block_map(config, params, i) for i in range(config.depth)]
    gains, paid = [], 0.0
    for block, nu, each in zip(blocks, search.nu, theta, strict=True):
        names = kernels.names(config)
        sigma = [np.float64(found.sigma[name][block]) for name in names]
        s = [x * np.exp(t) for x, t in zip(sigma, each, strict=True)]
        maps[block] = reference_map(config, params, block, found, s, nu)
        gains.append(np.log(np.linalg.norm(maps[block].T @ nu)))
        for now, x in zip(s, sigma, strict=True):
            paid += np.sum((now - x) ** 2) / np.sum(x**2)
    product, stretches = np.eye(config.embed_dim), []
    for block, each in enumerate(maps):
        if block == blocks[0]:  # logarithms count from here
            product /= np.linalg.norm(product) if block else 1.0
        product = each @ product
        stretches.append(np.log(np.linalg.norm(product, 2)))
    slack = np.mean(gains) if len(blocks) > 1 else gains[0] / 2
    stretches = np.array(stretches[blocks[0] :]) - ceiling - slack
    gains = np.array(gains) - slack
    want = [np.mean(np.square(np.maximum(x, 0.0))) for x in (stretches, gains)]
    assert want[0] > 0 and want[1] > 0 and paid > 0
    assert (stretches < 0).any() and (len(blocks) == 1 or (gains < 0).any())
    with jax.enable_x64(True):
        whole = whole._replace(ceiling=ceiling, slack=np.asarray(slack))
        got = float(jax.jit(stretch.objective)(whole, theta, price))
    # U and V are stored as float32, and orthogonal to 1e-7 only.
    assert got == pytest.approx(sum(want) + price * paid, rel=1e-5)


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    search, whole = problem()
    theta, h = changed(search), 1e-5
    direction = changed(search, seed=6)
    with jax.enable_x64(True):
        whole = whole._replace(ceiling=whole.ceiling - 1.0)  # so that all terms count

        @jax.jit
        @jax.value_and_grad
        def along(t):
            moved = jax.tree.map(lambda x, d: x + t * d, theta, direction)
            return stretch.objective(whole, moved, 0.03)

        got = along(0.0)[1]
        want = (along(h)[0] - along(-h)[0]) / (2 * h)
    assert got == pytest.approx(float(want), rel=1e-6)
