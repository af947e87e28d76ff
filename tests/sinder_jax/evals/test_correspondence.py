import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.evals import correspondence
from sinder_jax.evals.correspondence import correspondence_loss, fixed_point_free

GRID = np.arange(12.0, dtype=np.float32).reshape(1, 3, 4, 1)


def transcribed(
    features_a,
    features_b,
    code_a,
    code_b,
    shift,
    *,
    pointwise=True,
    centered_over=2,
    whole_batch=True,
    clamped="codes",
    most=np.inf,
    normalized=True,
):
    """The loss in float64 loops over images; the options after `pointwise` are wrong
    conventions, each of which must be seen by a test."""

    def cosines(a, b):
        a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (a, b))
        if normalized:
            a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return a @ b.T

    alike = np.stack([cosines(*pair) for pair in zip(features_a, features_b)])  # noqa: B905
    code = np.stack([cosines(*pair) for pair in zip(code_a, code_b)])  # noqa: B905
    if pointwise:
        axes = (0, 1, 2) if whole_batch else (1, 2)
        mean = alike.mean(axes, keepdims=True)
        alike = alike - alike.mean(centered_over, keepdims=True)
        alike = alike - alike.mean(axes, keepdims=True) + mean
    if clamped == "features":
        return -(code * np.maximum(alike - shift, 0)).mean()
    if clamped == "product":
        return -np.maximum(code * (alike - shift), 0).mean()
    if clamped == "codes":
        code = np.clip(code, 0, most)
    return -(code * (alike - shift)).mean()


def pairs(seed=0, n=3, side=4, dim=8, code_dim=5):
    """Codes that resemble their features, so that every mean counts."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, n, side, side, dim))
    features += rng.normal(size=(2, n, 1, 1, dim))
    codes = features[..., :code_dim] + 0.3
    return [jnp.asarray(x, jnp.float32) for x in (*features, *codes)]


# --- The specification's numbers ------------------------------------------------------


@pytest.mark.parametrize(
    "place, want", [((-1, -1), 0), ((1, -1), 3), ((-1, 1), 8), ((0, 0.5), 7.5)]
)
def test_samples_of_the_specification(place, want):
    coordinates = jnp.array(place, jnp.float32).reshape(1, 1, 1, 2)
    assert correspondence.sample(GRID, coordinates)[0, 0, 0, 0] == pytest.approx(want)


def rows_of(*vectors):
    return jnp.array(vectors, jnp.float32)[None, :, None]  # one image, S x 1 places


def test_loss_of_one_pair_of_the_specification():
    given = (
        rows_of((1, 0), (0, 1)),
        rows_of((1, 0), (3, 4)),
        rows_of((2, 0), (1, 1)),
        rows_of((-1, 1), (0, 5)),
        0.3,
    )
    assert correspondence_loss(*given) == pytest.approx(-0.12374, abs=1e-5)
    plain = correspondence_loss(*given, pointwise=False)
    assert plain == pytest.approx(-0.08839, abs=1e-5)


def test_loss_of_two_pairs_of_the_specification():
    a = jnp.concatenate([rows_of((1, 0), (0, 1)), rows_of((1, 1), (0, 1))])
    b = jnp.concatenate([rows_of((1, 0), (3, 4)), rows_of((1, 0), (0, -1))])
    loss = correspondence_loss(a, b, a, b, 0.2)
    assert loss == pytest.approx(-0.10279, abs=1e-5)
    apart = [
        correspondence_loss(*(x[i : i + 1] for x in (a, b, a, b)), 0.2) for i in (0, 1)
    ]
    assert abs(np.mean(apart) + 0.10279) > 1e-3  # the means are those of the batch


@pytest.mark.parametrize(
    "given, want", [([0, 2, 1, 3], [1, 2, 1, 0]), ([2, 1, 0, 3], [2, 2, 0, 0])]
)
def test_negatives_of_the_specification(given, want):
    assert fixed_point_free(jnp.array(given)).tolist() == want


# --- The transcription, and what it must tell apart -----------------------------------


@pytest.mark.parametrize("pointwise", [True, False])
def test_loss_equals_a_float64_transcription(pointwise):
    for seed in range(3):
        given = pairs(seed)
        want = transcribed(*given, 0.2, pointwise=pointwise)
        found = correspondence_loss(*given, 0.2, pointwise=pointwise)
        assert float(found) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pointwise": False},
        {"centered_over": 1},
        {"whole_batch": False},
        {"clamped": "features"},
        {"clamped": "product"},
        {"clamped": "nothing"},
        {"most": 0.8},
        {"normalized": False},
    ],
    ids=str,
)
def test_the_transcription_tells_other_conventions(wrong):
    given = pairs()
    found = float(correspondence_loss(*given, 0.2))
    assert found == pytest.approx(transcribed(*given, 0.2), abs=1e-6)
    assert abs(found - transcribed(*given, 0.2, **wrong)) > 5e-4


def test_the_loss_is_not_symmetric():
    a, b, code_a, code_b = pairs()
    swapped = correspondence_loss(b, a, code_b, code_a, 0.2)
    assert abs(correspondence_loss(a, b, code_a, code_b, 0.2) - swapped) > 1e-3


def test_no_gradient_passes_through_the_features():
    slopes = jax.grad(correspondence_loss, argnums=(0, 1, 2, 3))(*pairs(), 0.2)
    assert not slopes[0].any() and not slopes[1].any()
    assert slopes[2].any() and slopes[3].any()


def test_the_gradient_is_that_of_differences():
    given = [np.asarray(x, np.float64) for x in pairs(n=2, side=2)]
    slope = jax.grad(correspondence_loss, argnums=2)(*pairs(n=2, side=2), 0.2)
    for at in np.ndindex(given[2].shape):
        moved = [np.copy(given[2]) for _ in range(2)]
        moved[0][at] += 1e-5
        moved[1][at] -= 1e-5
        up, down = (transcribed(*given[:2], x, given[3], 0.2) for x in moved)
        assert slope[at] == pytest.approx((up - down) / 2e-5, abs=1e-6)


def test_lengths_of_features_and_codes_do_not_count():
    given = pairs()
    want = correspondence_loss(*given, 0.2)
    for i in range(4):
        longer = [7 * x if i == j else x for j, x in enumerate(given)]
        assert correspondence_loss(*longer, 0.2) == pytest.approx(float(want), abs=1e-7)


def test_codes_that_are_their_features_are_rewarded():
    features, *_ = pairs()
    assert correspondence_loss(*[features] * 4, 0.0) < 0
    assert correspondence_loss(*[features] * 4, 1.0) > 0  # nothing is so alike


# --- Samples --------------------------------------------------------------------------


def test_samples_equal_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 5, 7, 3)).astype(np.float32)
    places = rng.uniform(-1.3, 1.3, (2, 4, 4, 2)).astype(np.float32)  # some beyond

    def theirs(places, aligned):
        given = torch.tensor(maps).permute(0, 3, 1, 2), torch.tensor(places)
        found = torch.nn.functional.grid_sample(
            *given, padding_mode="border", align_corners=aligned
        )
        return found.permute(0, 2, 3, 1).numpy()

    found = correspondence.sample(maps, places)
    np.testing.assert_allclose(found, theirs(places, True), atol=2e-6)
    for wrong in (theirs(places, False), theirs(places[..., ::-1].copy(), True)):
        assert abs(found - wrong).max() > 0.1


def test_a_sample_between_positions_pulls_both():
    """The gradient of a mean of two is half for each."""
    slope = jax.grad(lambda x: correspondence.sample(x, jnp.zeros((1, 1, 1, 2))).sum())
    found = slope(jnp.ones((1, 1, 4, 1)))
    assert found.ravel().tolist() == [0, 0.5, 0.5, 0]


# --- Negatives ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 16])
def test_no_image_is_its_own_negative(count):
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = jax.vmap(lambda key: jax.random.permutation(key, count))(keys)
    assert (drawn == jnp.arange(count)[None]).any()  # some would be
    found = fixed_point_free(drawn)
    assert not (found == jnp.arange(count)[None]).any()
    assert ((found >= 0) & (found < count)).all()
