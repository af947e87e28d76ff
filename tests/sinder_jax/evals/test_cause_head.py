import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import cause_head, modularity
from sinder_jax.evals.cause_head import Attention, Head, Norm
from sinder_jax.evals.probes import Linear

apply = jax.jit(cause_head.apply)


def identity(n, copies=1):
    return Linear(jnp.tile(jnp.eye(n), copies), jnp.zeros(n * copies))


def norm(n, scale=1.0):
    return Norm(jnp.full(n, scale), jnp.zeros(n))


# --- The specification's numbers ------------------------------------------------------

FEATURES = jnp.array([(1, 0, 0.5), (0, 2, -1), (3, 1, 0), (-1, 1, 1)])
CODEBOOK = jnp.array([(1, 0, 0.2), (0, 1, 0.0)])
QUERIES = jnp.array([(0.1, 0, 0), (0, 0.1, 0), (0.2, 0, -0.1), (0, 0.2, 0.3)])


def specified(final=1.0):
    """D = 3, reduced 1, hidden 3, all matrices the identity."""
    return Head(
        queries=QUERIES,
        self_attention=Attention(identity(3, 3), identity(3)),
        cross_attention=Attention(identity(3, 3), identity(3)),
        wide=identity(3),
        narrow=identity(3),
        norms=(norm(3), norm(3), norm(3, final)),
        linear=Linear(jnp.array([[1.0], [0], [0]]), jnp.zeros(1)),
        hidden=identity(3),
        nonlinear=Linear(jnp.array([[0.0], [1], [1]]), jnp.zeros(1)),
    )


def test_the_specified_head():
    features = FEATURES.reshape(1, 2, 2, 3)
    quantized, codes = modularity.quantize(features, CODEBOOK)
    assert codes.ravel().tolist() == [0, 1, 0, 1]
    found = apply(specified(), features, quantized)
    want = [2.406402, 2.866060, 4.828639, 1.000000]
    np.testing.assert_allclose(found.ravel(), want, atol=2e-6)


def test_the_specified_intermediates():
    """Norms whose successors are 0 let LN1 and LN2 through, one at a time."""
    head, features = specified(), FEATURES.reshape(1, 2, 2, 3)
    quantized, _ = modularity.quantize(features, CODEBOOK)
    _, traced = decoder(head, features, quantized)
    first, second, h = (np.asarray(x)[0] for x in traced)
    np.testing.assert_allclose(first, [1.414167, -0.714897, -0.699270], atol=1e-6)
    np.testing.assert_allclose(second, [1.392834, -0.484272, -0.908562], atol=1e-6)
    np.testing.assert_allclose(h, [2.406402, -0.574674, -0.331728], atol=2e-6)


def test_without_the_block_two_projections_are_left():
    rng = np.random.default_rng(0)
    head = random_head(rng)
    head = head._replace(norms=(*head.norms[:2], norm(DIM, 0.0)))
    features, quantized, other = (random_grid(rng) for _ in range(3))
    x = cause_head.linear(head.hidden, features)
    want = cause_head.linear(head.linear, features)
    want += cause_head.linear(head.nonlinear, jnp.maximum(x, 0))
    np.testing.assert_allclose(apply(head, features, quantized), want, atol=1e-5)
    head = head._replace(queries=2 * head.queries)
    np.testing.assert_allclose(apply(head, features, other), want, atol=1e-5)


@pytest.mark.parametrize(
    "dim, count",
    [(384, 3_180_596), (768, 9_013_172), (1024, 14_376_116), (1536, 28_640_948)],
)
def test_parameter_counts(dim, count):
    head = jax.eval_shape(lambda key: cause_head.init(key, 529, dim), jax.random.key(0))
    leaves = jax.tree.leaves(head)
    assert (len(leaves), sum(x.size for x in leaves)) == (25, count)


def test_other_parameter_counts():
    for sizes, count in (((90, 2_048), 186_368), ((90, 27), 2_457)):
        layer = cause_head.init_linear(jax.random.key(0), *sizes)
        assert sum(x.size for x in layer) == count


# --- PyTorch --------------------------------------------------------------------------

DIM, REDUCED, SIDE = 8, 5, 3


def random_head(rng, tokens=SIDE * SIDE):
    head = cause_head.init(jax.random.key(0), tokens, DIM, REDUCED)
    return jax.tree.map(
        lambda x: (
            jnp.asarray(rng.normal(size=x.shape), jnp.float32)
            / np.sqrt(len(x) if x.ndim > 1 else 1)
        ),
        head,
    )


def random_grid(rng):
    return jnp.asarray(rng.normal(size=(2, SIDE, SIDE, DIM)), jnp.float32)


def tensor(x):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def set_linear(module, layer):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        module.weight.copy_(tensor(layer.kernel).T)
        module.bias.copy_(tensor(layer.bias))
    return module


def attention(layer):
    torch = pytest.importorskip("torch")
    dim = len(layer.qkv.kernel)
    module = torch.nn.MultiheadAttention(dim, 1, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        module.in_proj_weight.copy_(tensor(layer.qkv.kernel).T)
        module.in_proj_bias.copy_(tensor(layer.qkv.bias))
    set_linear(module.out_proj, layer.out)
    return lambda q, k, v: module(q, k, v, need_weights=False)[0]


def layer(linear):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(*linear.kernel.shape, dtype=torch.float64)
    return set_linear(module, linear)


def decoder(head, features, quantized, change=""):
    """The block of PyTorch's modules in float64; `change` breaks a convention.

    Returns the codes, and what LN1, LN2 and the final sum are of the first image.
    """
    torch = pytest.importorskip("torch")
    f, q = (tensor(x).flatten(1, 2) for x in (features, quantized))
    e = tensor(head.queries)[None]
    if change == "unit codes":
        q = torch.nn.functional.normalize(q, dim=-1)
    if change == "queries without codes":
        q = 0 * q
    norms = []
    for scale, shift in head.norms:
        module = torch.nn.LayerNorm(len(scale), dtype=torch.float64)
        with torch.no_grad():
            module.weight.copy_(tensor(scale))
            module.bias.copy_(tensor(shift))
        norms.append(module)
    first, second, third = norms
    value = q + e if change == "positions in values" else q
    a = attention(head.self_attention)(q + e, q + e, value)
    t1 = first(q + a)
    if change == "pre-norm":
        t1 = q + attention(head.self_attention)(*[first(q + e)] * 2, first(q))
    asked = t1 if change == "no positions across" else t1 + e
    key = f + e if change == "positions in keys" else f
    t2 = second(t1 + attention(head.cross_attention)(asked, key, f))
    inner = layer(head.wide)(t2)
    inner = torch.nn.functional.gelu(inner) if change == "gelu" else inner.relu()
    u = third(t2 + layer(head.narrow)(inner))
    h = {"no residual": u, "residual of the block": t2 + u}.get(change, f + u)
    nonlinear = layer(head.hidden)(h)
    nonlinear = nonlinear if change == "linear twice" else nonlinear.relu()
    out = layer(head.linear)(h) + layer(head.nonlinear)(nonlinear)
    traced = [x.detach().numpy()[0] for x in (t1, t2, h)]
    return out.detach().numpy().reshape(*features.shape[:3], -1), traced


def difference(change):
    rng = np.random.default_rng(1)
    head, features, quantized = random_head(rng), random_grid(rng), random_grid(rng)
    found = apply(head, features, 3 * quantized)
    want, _ = decoder(head, features, 3 * quantized, change)
    return np.abs(found - want).max()


def test_codes_are_those_of_pytorch_modules():
    assert difference("") < 2e-5  # float32 against float64, values up to 10


@pytest.mark.parametrize(
    "change",
    [
        "unit codes",
        "queries without codes",
        "positions in values",
        "pre-norm",
        "no positions across",
        "positions in keys",
        "gelu",
        "no residual",
        "residual of the block",
        "linear twice",
    ],
)
def test_each_convention_matters(change):
    assert difference(change) > 1e-2


# --- Start and dropout ----------------------------------------------------------------


def test_a_new_head_has_the_ranges_of_pytorch():
    dim = 64
    head = cause_head.init(jax.random.key(0), 400, dim)
    bounds = {
        "in": (head.self_attention.qkv.kernel, np.sqrt(6 / (4 * dim))),
        "out": (head.cross_attention.out.kernel, 1 / np.sqrt(dim)),
        "wide": (head.wide.kernel, 1 / np.sqrt(dim)),
        "narrow": (head.narrow.kernel, 1 / np.sqrt(2_048)),
        "narrow's bias": (head.narrow.bias, 1 / np.sqrt(2_048)),
        "nonlinear": (head.nonlinear.kernel, 1 / np.sqrt(dim)),
    }
    for name, (x, bound) in bounds.items():
        assert 0.97 * bound < np.abs(x).max() <= bound, name
    assert float(jnp.std(head.queries)) == pytest.approx(1, abs=0.02)
    for each in (head.self_attention, head.cross_attention):
        assert not each.qkv.bias.any() and not each.out.bias.any()
    # All that is drawn is drawn anew; ones, zeros and longer zeros repeat.
    assert len({np.asarray(x).tobytes() for x in jax.tree.leaves(head)}) == 15 + 3


def test_dropout_acts_on_elements_with_two_masks_at_the_end():
    """With LN3 = 0 and identities, f1(drop(F)) + f2(drop'(F)) of ones shows both."""
    n = 30
    head = cause_head.init(jax.random.key(0), 4, n, n)
    head = head._replace(
        norms=(*head.norms[:2], norm(n, 0.0)),
        linear=identity(n),
        hidden=identity(n),
        nonlinear=identity(n),
    )
    ones = jnp.ones((20, 2, 2, n))
    found = np.asarray(apply(head, ones, ones, key=jax.random.key(1)))
    values, counts = np.unique(np.round(found * 0.9, 4), return_counts=True)
    assert values.tolist() == [0, 1, 2]
    shares = counts / found.size
    np.testing.assert_allclose(shares, [0.01, 0.18, 0.81], atol=0.03)  # 4 deviations
    assert 0 < np.mean((found == 0).any((0, 1, 2))) <= 1  # not whole channels
    assert not (found == 0).all((0, 1, 2)).any()
    again = apply(head, ones, ones, key=jax.random.key(1))
    np.testing.assert_array_equal(found, again)


def test_dropout_reaches_every_place():
    """Eight masks: attention weights, outputs, FFN, its output, and two at the end."""
    rng = np.random.default_rng(0)
    head, x = random_head(rng), random_grid(rng)
    drawn = []

    def spied(key, p, shape):
        drawn.append(shape)
        return jnp.ones(shape, bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cause_head.jax.random, "bernoulli", spied)
        found = cause_head.apply(head, x, x, key=jax.random.key(0))
    n = SIDE * SIDE
    weights, rows, hidden = (2, n, n), (2, n, DIM), (2, n, 2_048)
    assert drawn == [weights, rows, weights, rows, hidden, rows, rows, rows]
    assert np.abs(found - apply(head, x, x)).max() > 0.1  # scaled by 1/0.9 all the same


def test_images_of_another_size_are_refused():
    rng = np.random.default_rng(0)
    x = jnp.ones((1, 2, 4, DIM))
    said = error_of(cause_head.apply, random_head(rng), x, x)
    assert "8 tokens" in said and "the 9 of 8 numbers" in said
