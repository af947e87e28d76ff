import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinder_jax.evals import concept_bank


def insert(bank, codes, first=0, key=0):
    """Token t becomes the vector (first + t, 1)."""
    codes = jnp.asarray(codes, jnp.int32)
    numbers = first + jnp.arange(len(codes), dtype=jnp.float32)
    vectors = jnp.stack([numbers, jnp.ones(len(codes))], axis=1)
    return jitted_insert(bank, codes, vectors, jax.random.key(key))


jitted_insert = jax.jit(concept_bank.insert)


def contents(bank):
    """The numbers of the tokens of each code, oldest first."""
    size = bank.keys.shape[1]
    found = []
    for queue, count, following in zip(*map(np.asarray, bank), strict=True):
        places = [(following - count + i) % size for i in range(count)]
        assert (queue[places, 1] == 1).all()
        found.append(queue[places, 0].astype(int).tolist())
    return found


@pytest.mark.parametrize("tokens, added", [(7, 3), (1, 0), (2, 1), (0, 0)])
def test_half_of_the_tokens_of_a_code_are_added(tokens, added):
    bank = insert(concept_bank.empty(3, 2, 10), [1] * tokens + [2])
    assert bank.counts.tolist() == [0, added, 0]
    (_, of_code, _) = contents(bank)
    assert len(set(of_code)) == added and all(t < tokens for t in of_code)


def test_keys_are_kept_as_they_come():
    bank = insert(concept_bank.empty(2, 2, 4), [0, 0], first=300)
    np.testing.assert_array_equal(np.linalg.norm(bank.keys[0, 0]) > 299, True)
    assert (bank.keys[1] == 0).all()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_queues_are_those_of_lists(size):
    """Also with more tokens at once than a queue has places."""
    rng = np.random.default_rng(0)
    bank, lists, first = concept_bank.empty(4, 2, size), [[] for _ in range(4)], 0
    for step in range(12):
        codes = rng.choice(4, 14, p=[0.6, 0.3, 0.1, 0])
        bank = insert(bank, codes, first, key=step)
        for code, of_code in enumerate(contents(bank)):
            here = [first + t for t in np.flatnonzero(codes == code)]
            chosen = min(len(here) // 2, size)
            new = of_code[len(of_code) - chosen :]
            assert set(new) <= set(here) and len(set(new)) == chosen
            lists[code] = (lists[code] + new)[-size:]
            assert of_code == lists[code]
        first += len(codes)
    assert bank.counts.tolist() == [size, size, min(size, len(lists[2])), 0]


def test_which_tokens_are_added_is_uniform():
    chosen = [
        contents(insert(concept_bank.empty(1, 2, 9), [0] * 5, key=key))[0]
        for key in range(100)
    ]
    shares = np.bincount(np.ravel(chosen), minlength=5) / len(chosen)
    np.testing.assert_allclose(shares, 2 / 5, atol=0.2)  # 4 deviations
    assert contents(insert(concept_bank.empty(1, 2, 9), [0] * 5, key=3)) == [chosen[3]]


def test_rows_are_the_filled_places():
    bank = insert(concept_bank.empty(3, 2, 4), [2, 2, 0, 0, 0, 0])
    rows, filled = concept_bank.rows(bank)
    assert filled == 3 and rows.shape == (12,)
    assert rows[:3].tolist() == [0, 1, 8]
