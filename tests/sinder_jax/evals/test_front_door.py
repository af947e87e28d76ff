import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.evals import cause_head, front_door, modularity
from sinder_jax.evals.cause_optimizer import Options

B, SIDE, D, K, CLASSES, REDUCED, PROJECTED, SIZE = 3, 8, 6, 4, 3, 5, 7, 9
OPTIONS = Options(lr=0.01)
SIZES = {"reduced": REDUCED, "projected": PROJECTED, "bank_size": SIZE}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(B, SIDE, SIDE, D)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (B, 20, 20)).astype(np.uint8)
    return jnp.asarray(features), jnp.asarray(labels)


@pytest.fixture(scope="module")
def codebook():
    return jax.random.normal(jax.random.key(5), (K, D))


def start(codebook):
    """Student and teacher that differ, as after some steps."""
    state = front_door.init(jax.random.key(0), codebook, SIDE * SIDE, CLASSES, **SIZES)
    other = front_door.init(jax.random.key(1), codebook, SIDE * SIDE, CLASSES, **SIZES)
    return state._replace(teacher=other.teacher)


def taken(codebook, batch, steps=1):
    step, state = front_door.make_step(codebook, OPTIONS), start(codebook)
    for k in range(steps):
        state, losses = step(state, *batch, jax.random.key(k))
    return jax.tree.map(np.asarray, state), np.asarray(losses)


def differ(a, b):
    return {
        bool((x != y).any())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    }


def test_a_new_teacher_is_the_student_and_the_bank_is_empty(codebook):
    state = front_door.init(jax.random.key(0), codebook, SIDE * SIDE, CLASSES, **SIZES)
    assert differ(state.student, state.teacher) == {False}
    assert state.bank.keys.shape == (K, SIZE, PROJECTED) and not state.bank.counts.any()
    full = jax.eval_shape(
        lambda key: front_door.init(key, jnp.zeros((2_048, 384)), 529, 27),
        jax.random.key(0),
    )
    assert full.bank.keys.size * 4 == 1_677_721_600
    assert sum(x.size for x in full.student.projection) == 186_368


def test_the_teacher_follows_the_updated_student(codebook, batch):
    state, losses = taken(codebook, batch)
    before = start(codebook)
    for old, new, student in zip(
        *map(jax.tree.leaves, (before.teacher, state.teacher, state.student)),
        strict=True,
    ):
        np.testing.assert_allclose(new, 0.99 * old + 0.01 * student, atol=1e-6)
    assert differ(before.student, state.student) == {True}
    assert np.isfinite(losses).all() and losses[0] > 0


def test_the_bank_takes_projections_of_the_old_teacher(codebook, batch):
    """With dropout, whose key is the second of the step's."""
    state, _ = taken(codebook, batch)
    features = batch[0]
    quantized, codes = modularity.quantize(features, codebook)
    of_teacher = jax.random.split(jax.random.key(0), 4)[1]

    def distances(teacher, key):
        z = cause_head.apply(teacher.head, features, quantized, key=key)
        p = np.asarray(cause_head.linear(teacher.projection, z))
        found = []
        for code, count in enumerate(state.bank.counts):
            own = p[np.asarray(codes) == code]
            gaps = np.abs(state.bank.keys[code, :count, None] - own).max(-1)
            found += gaps.min(1).tolist()
        return np.array(found)

    teacher = start(codebook).teacher
    assert distances(teacher, of_teacher).max() < 1e-5
    assert distances(teacher, None).min() > 1e-3
    assert distances(state.teacher, of_teacher).min() > 1e-5
    sampled = B * (SIDE // 4) ** 2
    assert sampled // 2 - K <= state.bank.counts.sum() <= sampled // 2


def test_labels_move_the_linear_probe_alone(codebook, batch):
    """And the student only by way of the norm that gradients are clipped to."""
    features, labels = batch
    others = (features, (labels + 1) % CLASSES)
    states = [taken(codebook, each, steps=2)[0] for each in (batch, others)]
    first, second = states
    assert differ(first.linear, second.linear) == {True}
    for name in ("student", "teacher", "bank"):
        assert differ(getattr(first, name), getattr(second, name)) == {False}, name


def test_a_step_uses_the_bank_of_the_steps_before(codebook, batch):
    """The second loss, with an emptied bank, would be another."""
    step, state = front_door.make_step(codebook, OPTIONS), start(codebook)
    state, _ = step(state, *batch, jax.random.key(0))
    emptied = jax.tree.map(jnp.copy, state)
    counts = jnp.zeros_like(emptied.bank.counts)
    emptied = emptied._replace(bank=emptied.bank._replace(counts=counts))
    losses = [
        np.asarray(step(each, *batch, jax.random.key(1))[1])
        for each in (state, emptied)
    ]
    assert losses[0][0] != losses[1][0] and losses[0][1] == losses[1][1]


def test_a_step_is_a_function_of_its_key(codebook, batch):
    first, again = (taken(codebook, batch, steps=2) for _ in range(2))
    assert differ(first, again) == {False}


def test_a_student_learns_what_its_teacher_tells_apart(codebook, batch):
    step, losses = front_door.make_step(codebook, OPTIONS), []
    state = front_door.init(jax.random.key(0), codebook, SIDE * SIDE, CLASSES, **SIZES)
    for k in range(60):
        state, loss = step(state, *batch, jax.random.key(k))
        losses.append(np.asarray(loss))
    assert np.mean(losses[-10:], axis=0)[0] < np.mean(losses[1:6], axis=0)[0] - 0.3
