"""CAUSE's concept bank: for each code a queue of projections of the teacher.

    sampled codes, projections --insert--> the newest 100 of each code, in place
    bank --rows--> where the filled places are, code by code

Source: ByungKwanLee/Causal-Unsupervised-Segmentation modules/segment_module.py,
`bank_init` and `bank_update`. The queues lie in one array that never changes its shape,
1.68 GB at full size, so that a jitted step can donate it and insert in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SIZE = 100  # projections kept of each code


class ConceptBank(NamedTuple):
    """Queues of vectors.

    Attributes:
      keys: as they were inserted, not normalized; 0 where nothing was.
      counts: filled places of each code, int32.
      next: the place that comes next, int32; of a full queue the oldest.
    """

    keys: Float[Array, "K size P"]
    counts: Int[Array, " K"]
    next: Int[Array, " K"]


def empty(codes: int, dim: int, size: int = SIZE) -> ConceptBank:
    """A bank without projections; `codes` · `size` · `dim` floats of 4 bytes."""
    zeros = jnp.zeros(codes, jnp.int32)
    return ConceptBank(jnp.zeros((codes, size, dim)), zeros, jnp.copy(zeros))


def insert(
    bank: ConceptBank,
    codes: Int[Array, " T"],
    projections: Float[Array, "T P"],
    key: Array,
) -> ConceptBank:
    """Appends a random half of the tokens of each code, rounded down.

    Of n tokens with one code, floor(n/2) are appended: one alone adds nothing. A queue
    keeps its newest `size`, also if more than that are appended at once.

    Args:
      bank: may be donated.
      codes: of the step's sampled tokens.
      projections: of the teacher, before its update.
      key: of the choice.
    """
    size = bank.keys.shape[1]
    same = codes[:, None] == codes[None, :]
    order = jax.random.permutation(key, len(codes))
    rank = jnp.sum(same & (order[None, :] < order[:, None]), axis=1)
    chosen = jnp.sum(same, axis=1) // 2  # of the token's code
    kept = (rank < chosen) & (rank >= chosen - size)
    place = (bank.next[codes] + rank) % size
    row = jnp.where(kept, codes, len(bank.keys))  # beyond the bank: dropped
    added = jnp.zeros_like(bank.counts).at[codes].max(chosen.astype(jnp.int32))
    return ConceptBank(
        bank.keys.at[row, place].set(projections, mode="drop", unique_indices=True),
        jnp.minimum(bank.counts + added, size),
        (bank.next + added) % size,
    )


def rows(bank: ConceptBank) -> tuple[Int[Array, " places"], Int[Array, ""]]:
    """Places of `keys`, as rows of [K·size, P], the filled ones first.

    Returns:
      Row numbers, int32, in ascending order, and how many of them are filled; those
      after them are 0.
    """
    size = bank.keys.shape[1]
    filled = jnp.arange(size)[None, :] < bank.counts[:, None]
    (found,) = jnp.nonzero(filled.ravel(), size=filled.size, fill_value=0)
    return found.astype(jnp.int32), jnp.sum(bank.counts)
