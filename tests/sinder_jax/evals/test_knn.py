import jax
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals import knn

# Spec knn.md, section 8: made with the official module.
BANK = np.array(
    [(1, 0), (0.9, 0.1), (0, 1), (0.1, 0.9), (0.7, 0.7), (-1, 0)], np.float32
)
LABELS = np.array([0, 0, 1, 1, 2, 2])
QUERIES = np.array([(0.8, 0.5), (0.2, 1.0)], np.float32)
COSINES = [
    (0.847998, 0.901340, 0.529999, 0.620403, 0.974391, -0.847998),
    (0.196116, 0.303204, 0.980581, 0.996241, 0.832050, -0.196116),
]
VOTES = {
    1: [(0, 0, 0.655876), (0, 0.527594, 0)],
    3: [(0.338802, 0, 0.655876), (0, 0.949428, 0.050539)],
    5: [(0.338802, 0.005322, 0.655876), (0.000032, 0.949428, 0.050539)],
}


def random(rows, width=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, width)).astype(np.float32) * 7


def with_ties(rows=300, seed=0):
    """Every row of the bank stands there three times, under its own label or others."""
    rng = np.random.default_rng(seed)
    distinct = random(rows // 3, seed=seed)
    order = rng.permutation(rows)
    return np.tile(distinct, (3, 1))[order], rng.integers(0, 5, rows)


def by_sorting(bank, queries, k):
    """Rows by cosine, in float64; equal ones in their order."""
    x, q = (
        each.astype(np.float64)
        / np.linalg.norm(each.astype(np.float64), axis=1)[:, None]
        for each in (bank, queries)
    )
    cosines = np.round(q @ x.T, 12)  # what is equal is equal
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, order, axis=1), order


def test_the_spec_s_example_gives_its_votes():
    found = knn.classify(BANK, LABELS, QUERIES, ks=(1, 3, 5))
    assert list(found) == [1, 3, 5]
    for k, expected in VOTES.items():
        assert found[k].dtype == np.float32
        np.testing.assert_allclose(found[k], expected, atol=1e-6)
    nearest = knn.neighbors(BANK, QUERIES, 6)
    order = np.argsort(nearest.rows, axis=1)
    cosines = np.take_along_axis(nearest.cosines, order, axis=1)
    np.testing.assert_allclose(cosines, COSINES, atol=1e-6)


def test_votes_are_scikit_learn_s_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    neighbors = pytest.importorskip("sklearn.neighbors")
    data = datasets.load_digits()
    bank, queries = data.data[:1200], data.data[1200:]
    found = knn.classify(bank, data.target[:1200], queries, ks=(10, 200))
    for k in (10, 200):
        oracle = neighbors.KNeighborsClassifier(
            k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine"
        ).fit(bank, data.target[:1200])
        expected = oracle.predict_proba(queries)
        ours = found[k] / found[k].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(ours, expected, atol=1e-5)  # float32 cosines / 0.07
        right = data.target[1200:] == found[k].argmax(1)
        assert right.mean() == oracle.score(queries, data.target[1200:])


def test_of_equal_cosines_the_earlier_row_is_nearer():
    bank, labels = with_ties()
    queries = random(40, seed=1)
    # 7 cuts through three equal rows.
    cosines, rows = by_sorting(bank, queries, 7)
    found = knn.neighbors(bank, queries, 7)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)
    later = np.flip(bank, axis=0)
    assert not np.array_equal(knn.neighbors(later, queries, 7).rows, 299 - rows)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("tile", [1, 4096, 65_536])
def test_tiles_and_devices_change_no_neighbor(devices, tile):
    bank, _ = with_ties(6000)
    queries = random(600, seed=1)  # more than one block of queries
    _, rows = by_sorting(bank, queries, 7)
    found = knn.neighbors(bank, queries, 7, devices=jax.devices()[:devices], tile=tile)
    np.testing.assert_array_equal(found.rows, rows)


def test_tiles_and_devices_change_no_bit():
    # Cosines of ones and zeros are equal for many rows, up to the order of a sum.
    rng = np.random.default_rng(0)
    bank, queries = ((rng.random((n, 64)) > 0.5).astype(np.float32) for n in (4100, 40))
    whole = knn.neighbors(bank, queries, 200, devices=jax.devices()[:1])
    assert (np.diff(whole.cosines) > -1e-6).mean() > 0.5
    for count, tile in ((1, 1000), (2, 1000), (2, 65_536)):
        devices = jax.devices()[:count]
        found = knn.neighbors(bank, queries, 200, devices=devices, tile=tile)
        np.testing.assert_array_equal(found.rows, whole.rows)
        np.testing.assert_array_equal(found.cosines, whole.cosines)


def test_groups_lose_no_neighbor():
    k = 5
    bank, _ = with_ties(3000)  # 256 groups of two blocks, of which 5 are looked into
    queries = random(64, seed=2)
    two = jax.numpy.zeros((2, 1, knn.BLOCK))
    assert knn._candidates(two, k)[0].shape == (1, 80)
    _, rows = by_sorting(bank, queries, k)
    np.testing.assert_array_equal(knn.neighbors(bank, queries, k).rows, rows)


def test_a_bank_on_the_disk_is_read_from_there(tmp_path):
    bank = random(100)
    file = np.memmap(tmp_path / "bank", np.float16, "w+", shape=bank.shape)
    file[:] = bank
    found = knn.neighbors(file, bank[:5], 1)
    assert found.rows[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_bank_row_finds_itself_whatever_its_length():
    bank = random(50)
    lengths = np.float32(10.0) ** np.arange(-10, 10)[:, None]
    found = knn.neighbors(bank, bank[:20] * lengths, 1)
    assert found.rows[:, 0].tolist() == list(range(20))
    np.testing.assert_allclose(found.cosines, 1, atol=1e-6)
    huge = knn.neighbors(bank * np.float32(1e30), bank[:20], 1)
    assert huge.rows[:, 0].tolist() == list(range(20))


def test_k_1_is_the_nearest_s_label_and_a_cold_vote_too():
    bank, queries = random(300), random(60, seed=1)
    labels = np.random.default_rng(0).integers(0, 5, 300)
    nearest = knn.classify(bank, labels, queries, ks=(1,))[1].argmax(1)
    for temperature in (1e-4, 1e-30):
        cold = knn.classify(bank, labels, queries, temperature=temperature)[200]
        np.testing.assert_array_equal(cold.argmax(1), nearest)


def test_votes_for_a_smaller_k_are_those_of_one_softmax():
    bank, queries = random(300), random(60, seed=1)
    labels = np.random.default_rng(0).integers(0, 5, 300)
    both = knn.classify(bank, labels, queries, ks=(10, 200))
    alone = knn.classify(bank, labels, queries, ks=(10,))[10]
    assert (both[10].sum(1) < 1).all()
    np.testing.assert_allclose(both[200].sum(1), 1, atol=1e-6)
    share = both[10].sum(1, keepdims=True)
    np.testing.assert_allclose(alone * share, both[10], atol=1e-6)


def test_classes_of_the_bank_need_not_be_all():
    found = knn.classify(BANK, LABELS, QUERIES, ks=(5,), num_classes=7)[5]
    assert found.shape == (2, 7) and not found[:, 3:].any()


def test_arrays_are_taken_too():
    arrays = map(jax.numpy.asarray, (BANK, LABELS, QUERIES))
    found = knn.classify(*arrays, ks=np.array([3, 5]))
    np.testing.assert_allclose(found[3], VOTES[3], atol=1e-6)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"ks": (1, 7)}, "got K = 7, but the bank has only 6 rows"),
        ({"ks": (0,)}, "expected numbers of at least 1"),
        ({"ks": ()}, "expected numbers of at least 1"),
        ({"num_classes": 2}, "got the label 2, expected 0 to 1"),
        ({"bank_labels": LABELS - 1}, "got the label -1"),
        ({"bank_labels": LABELS[:5]}, "got labels (5,) of int64 for a bank of 6 rows"),
        ({"bank_labels": LABELS * 1.0}, "expected 6 integers"),
        ({"queries": np.ones((2, 3), np.float32)}, "features of the same model?"),
        ({"queries": np.full((2, 2), np.nan)}, "got a query that is not finite"),
        ({"bank": np.full((6, 2), np.inf)}, "got a row of the bank that is not finite"),
        ({"temperature": 0.0}, "got temperature=0.0"),
        ({"temperature": 1e-50}, "expected a number from 1e-30 to 1e+30"),
        ({"bank": BANK[:0], "bank_labels": LABELS[:0]}, "got an empty bank"),
    ],
)
def test_what_cannot_be_classified_raises(changed, message):
    given = {"bank": BANK, "bank_labels": LABELS, "queries": QUERIES, "ks": (1,)}
    given |= changed
    bank, labels, queries = (
        given.pop(name) for name in ("bank", "bank_labels", "queries")
    )
    assert message in error_of(knn.classify, bank, labels, queries, **given)
