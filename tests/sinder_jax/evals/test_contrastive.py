import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.evals import concept_bank, contrastive, modularity
from sinder_jax.evals.concept_bank import ConceptBank

loss_of = jax.jit(contrastive.contrastive_loss)
loss_and_slope = jax.jit(jax.value_and_grad(contrastive.contrastive_loss))


def filled(codes, dim, size, queues):
    """A bank with some vectors of some codes."""
    bank = concept_bank.empty(codes, dim, size)
    keys, counts = np.array(bank.keys), np.array(bank.counts)
    for code, queue in queues.items():
        keys[code, : len(queue)] = queue
        counts[code] = len(queue)
    counts = jnp.asarray(counts)
    return ConceptBank(jnp.asarray(keys), counts, counts % size)


# --- The specification's numbers ------------------------------------------------------

CODEBOOK = jnp.array([(1, 0), (0, 1), (0.8, 0.6)])
FEATURES = jnp.array([[(1, 0.1), (0.1, 1)], [(0.9, 0.7), (-0.1, 2)]])
STUDENT = jnp.array([[(1.0, 0), (0, 1)], [(1, 1), (0.5, 1)]])
TEACHER = jnp.array([[(1, 0.2), (0.1, 1)], [(1, 0.8), (0, 1)]])


def specified(bank):
    _, codes = modularity.quantize(FEATURES, CODEBOOK)
    assert codes.tolist() == [[0, 1], [2, 1]]
    related = contrastive.relations(CODEBOOK)
    return loss_and_slope(STUDENT, TEACHER, codes, related, bank)


def test_the_specified_loss_without_a_bank():
    loss, _ = specified(concept_bank.empty(3, 2, 4))
    assert loss == pytest.approx(1.4417864, abs=5e-7)


def test_the_specified_loss_with_a_bank():
    loss, gradient = specified(filled(3, 2, 4, {0: [(2, 0)], 1: [(0, 1), (1, 3)]}))
    assert loss == pytest.approx(1.2253419, abs=5e-7)
    want = [[(0, 0.00010), (-1.05302, 0)], [(0.12594, -0.12594), (0.02687, -0.01343)]]
    np.testing.assert_allclose(gradient, want, atol=5e-6)


# --- Random numbers -------------------------------------------------------------------


def reference(student, teacher, codes, codebook, queues, change=""):
    """Loops over images in float64 PyTorch; `change` breaks a convention."""
    torch = pytest.importorskip("torch")

    def unit(x):
        return torch.nn.functional.normalize(x, dim=-1)

    vectors = unit(torch.tensor(codebook, dtype=torch.float64))
    every = torch.tensor(codes)
    flat = torch.tensor(np.float64(teacher)).flatten(0, 1)
    terms = []
    keys = [(flat, every.flatten(), True)]
    if queues:
        inside = [torch.tensor(np.float64(queue)) for queue in queues.values()]
        of_code = [torch.full((len(q),), c) for c, q in queues.items()]
        keys.append((torch.cat(inside), torch.cat(of_code), False))
    if change == "local only":
        keys = keys[:1]
    for key, code, local in keys:
        for b, anchors in enumerate(student):
            same = vectors[every[b]] @ vectors[code].T
            if change == "equal codes":
                same = (every[b][:, None] == code[None]).double()
            positive, negative = same > 0.3, same < 0.1
            if change == "no gap":
                negative = same <= 0.3
            if local and change != "with itself":
                own = torch.arange(len(anchors))
                positive[own, own + b * len(anchors)] = False
            k = key if change == "raw keys" else unit(key)
            a = anchors if change == "raw anchors" else unit(anchors)
            scores = a @ k.T / (0.1 if change == "temperature" else 0.07)
            counted = negative if change == "negatives only" else positive | negative
            masked = scores.masked_fill(~counted, -torch.inf)
            each = masked.logsumexp(1, keepdim=True) - scores
            if change == "mean of anchors":
                term = ((each * positive).sum(1) / positive.sum(1).clamp(1)).mean()
                terms.append(term)
            elif positive.any():
                terms.append(each[positive].mean())
    return torch.stack(terms).mean() if terms else torch.zeros(())


def random_case(seed=0, images=3, n=6, width=7, dim=3, codes=9):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, images, n, width)).astype(np.float32)
    codebook = rng.normal(size=(codes, dim)).astype(np.float32)
    of_tokens = rng.integers(0, codes, (images, n)).astype(np.int32)
    sizes = {0: 5, 2: 1, 3: 4, 7: 5, 8: 2}  # the others are empty
    queues = {c: 3 * rng.normal(size=(m, width)) for c, m in sizes.items()}
    return student, teacher, of_tokens, codebook, queues


def ours(case, run=loss_and_slope):
    student, teacher, of_tokens, codebook, queues = case
    bank = filled(len(codebook), student.shape[-1], 5, queues)
    related = contrastive.relations(jnp.asarray(codebook))
    loss, gradient = run(student, teacher, of_tokens, related, bank)
    return float(loss), np.asarray(gradient)


def theirs(case, change=""):
    torch = pytest.importorskip("torch")
    student = torch.tensor(np.float64(case[0]), requires_grad=True)
    loss = reference(student, *case[1:], change)
    loss.backward()
    return loss.item(), student.grad.numpy()


@pytest.mark.parametrize("block", [4, 4_096])
def test_loss_and_gradient_are_those_of_loops_over_images(block, monkeypatch):
    """However many blocks the bank's 17 keys are compared in."""
    monkeypatch.setattr(contrastive, "BLOCK", block)
    case = random_case()
    traced = jax.jit(
        jax.value_and_grad(lambda *arrays: contrastive.contrastive_loss(*arrays))
    )
    for found, want in zip(ours(case, traced), theirs(case), strict=True):
        np.testing.assert_allclose(found, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        "local only",
        "equal codes",
        "no gap",
        "with itself",
        "raw keys",
        "raw anchors",
        "temperature",
        "negatives only",
        "mean of anchors",
    ],
)
def test_each_convention_matters(change):
    case = random_case()
    assert abs(ours(case)[0] - theirs(case, change)[0]) > 0.01


def test_relations_are_strict():
    """Cosine 0.5 exactly, of vectors whose length is a power of 2."""
    codebook = jnp.array([(1.0, 1, 1, 1), (1, 1, 1, -1)])
    thresholds = contrastive.Thresholds(0.5, 0.5)
    positive, negative = contrastive.relations(codebook, thresholds)
    assert positive.tolist() == [[True, False], [False, True]]
    assert not negative.any()
    assert contrastive.relations(codebook).positive.all()  # published: 0.3


def test_images_without_positive_pairs_are_left_out():
    """One code of its own in each token: only the bank has some for the second."""
    codebook = np.eye(4, dtype=np.float32)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 2, 5)).astype(np.float32)
    codes = np.array([[0, 1], [2, 3]], np.int32)
    for queues in ({}, {3: rng.normal(size=(2, 5))}):
        case = student, teacher, codes, codebook, queues
        found, gradient = ours(case)
        assert np.isfinite(gradient).all()
        if queues:
            want, wanted = theirs(case)
            assert found == pytest.approx(want, abs=1e-6) and found > 0
            np.testing.assert_allclose(gradient, wanted, atol=2e-6)
        else:
            assert found == 0 and (gradient == 0).all()


def test_no_gradient_reaches_teacher_and_bank():
    student, teacher, codes, codebook, queues = random_case()
    bank = filled(len(codebook), student.shape[-1], 5, queues)
    related = contrastive.relations(jnp.asarray(codebook))

    def loss(teacher, keys):
        changed = bank._replace(keys=keys)
        return loss_of(student, teacher, codes, related, changed)

    for slope in jax.grad(loss, argnums=(0, 1))(jnp.asarray(teacher), bank.keys):
        assert (slope == 0).all()


def test_places_that_were_never_filled_do_not_count():
    student, teacher, codes, codebook, queues = random_case()
    related = contrastive.relations(jnp.asarray(codebook))
    losses = []
    for junk in (0, 1e3):
        bank = filled(len(codebook), student.shape[-1], 5, queues)
        empty = np.arange(5)[None] >= np.asarray(bank.counts)[:, None]
        keys = jnp.where(empty[..., None], junk, bank.keys)
        bank = bank._replace(keys=keys)
        losses.append(float(loss_of(student, teacher, codes, related, bank)))
    assert losses[0] == losses[1]
