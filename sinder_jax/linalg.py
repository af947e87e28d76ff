"""Linear algebra of many matrices on the host: NumPy float64, one matrix per core.

    function, jobs --in_parallel--> results, in the order of the jobs
    matrix --Gram matrix of its shorter side--> singular values and vectors
    maps E_0, E_1, … --running_triplets--> leading triplets of E_0, E_1·E_0, …

A matrix multiplies a column: `u` is its output side, `v` its input side. A singular
vector has no sign. The square of a singular value is an eigenvalue of the Gram matrix,
which is several times faster than an SVD and exact to 1e-16·(σ_0/σ_i)².
"""

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

# A giant's largest kernel takes half a gigabyte of work space.
MOST_AT_ONCE = 16
# Blocks whose maps and running products are in memory together, 300 MB for a giant.
BLOCKS_AT_ONCE = 8
# Of σ_0²: from here on the Gram matrix gives a singular value to 1e-8.
GRAM_IS_ENOUGH = 1e-8
TINY = np.finfo(float).tiny

Progress = Callable[[int, int], Any]
"""Called as `progress(done, total)` after each piece of a long computation."""

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def one_thread() -> Any:
    """Context in which LAPACK uses one thread, so that results do not depend on cores.

    The number of threads changes the order of LAPACK's sums, and so how the singular
    vectors of close singular values are turned.
    """
    return threadpool_limits(1)


def in_parallel(
    function: Callable[[_Job], _Result],
    jobs: Sequence[_Job],
    progress: Progress | None = None,
) -> Iterator[_Result]:
    """Yields `function(job)` for each job in order, computing one job per core.

    LAPACK gains little from several cores within one matrix, and with one thread each
    the results do not depend on how many there are. If the caller is interrupted, jobs
    that have not begun are dropped.

    Args:
      function: may raise.
      jobs: any number.
      progress: called after each result, in the caller's thread.
    """
    workers = min(os.cpu_count() or 1, MOST_AT_ONCE)
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        for done, result in enumerate(pool.map(function, jobs), start=1):
            yield result
            if progress is not None:
                progress(done, len(jobs))


def by_kernel(
    function: Callable[[str, int], _Result],
    names: Sequence[str],
    depth: int,
    progress: Progress | None = None,
) -> Generator[tuple[str, list[_Result]], None, None]:
    """Yields each kernel's name with `function(name, block)` of every block.

    Args:
      function: as for `in_parallel`.
      names: kernels, each computed for blocks 0 to depth - 1.
      depth: number of blocks.
      progress: called after each result, in the caller's thread.
    """
    jobs = [(name, block) for name in names for block in range(depth)]
    results = in_parallel(lambda job: function(*job), jobs, progress)
    named = zip(jobs, results, strict=True)
    for name, group in itertools.groupby(named, key=lambda pair: pair[0][0]):
        yield name, [result for _, result in group]


# --- Singular values by the Gram matrix of the shorter side ---------------------------


def wide(matrix: np.ndarray) -> np.ndarray:
    """The matrix or its transpose, whichever has no more rows than columns; a view."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def short_side(
    wide: Float[np.ndarray, "short long"], **solver: Any
) -> tuple[Float[np.ndarray, "short n"], Float[np.ndarray, " n"]]:
    """Singular vectors (columns) of the shorter side and σ, descending.

    Args:
      wide: float64.
      **solver: options of `scipy.linalg.eigh`, such as a subset.
    """
    squares, vectors = _scipy().eigh(wide @ wide.T, **solver)
    return vectors[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0.0))


def singular_values(matrix: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " S"]:
    """All singular values, descending, in float64, each to at least eight digits.

    From the Gram matrix where that is enough, and otherwise from an SVD.
    """
    rows = wide(np.asarray(matrix, np.float64))
    squares = _scipy().eigvalsh(rows @ rows.T)
    if squares[0] > GRAM_IS_ENOUGH * squares[-1]:
        return np.sqrt(squares[::-1])
    return _scipy().svdvals(rows)


class Triplets(NamedTuple):
    """Leading singular triplets of a matrix that multiplies a column.

    Attributes:
      u: output side, unit columns of arbitrary sign.
      s: singular values, descending.
      v: input side, unit columns, each with the sign that belongs to its `u`.
    """

    u: Float[np.ndarray, "out n"]
    s: Float[np.ndarray, " n"]
    v: Float[np.ndarray, "in n"]


def leading_triplets(matrix: Float[np.ndarray, "out in"], count: int) -> Triplets:
    """The `count` leading singular triplets, in float64.

    A singular value of zero gets a vector of zeros on the longer side.

    Raises:
      ValueError: `count` is not between 1 and the shorter side.
    """
    matrix = np.asarray(matrix, np.float64)
    rows = wide(matrix)
    size = len(rows)
    if not 1 <= count <= size:
        raise ValueError(
            f"a matrix of {matrix.shape[0]} x {matrix.shape[1]} has 1 to {size} "
            f"singular values, not {count}"
        )
    short, s = short_side(rows, subset_by_index=(size - count, size - 1))
    if len(s) < count:  # of many equal values LAPACK may find too few by their number
        short, s = short_side(rows)
        short, s = short[:, :count], s[:count]
    long = rows.T @ short / np.maximum(s, TINY)[None, :]
    return Triplets(short, s, long) if rows is matrix else Triplets(long, s, short)


def solve(
    matrix: Float[np.ndarray, "n n"], right: Float[np.ndarray, "n m"]
) -> Float[np.ndarray, "n m"]:
    """X of matrix·X = right, for a positive definite matrix."""
    return _scipy().solve(matrix, right, assume_a="pos")


def _scipy() -> Any:
    import scipy.linalg  # here: it takes long to import, and --help must not

    return scipy.linalg


# --- Running products -----------------------------------------------------------------


def running_triplets(
    block_map: Callable[[int], Float[np.ndarray, "D D"]],
    depth: int,
    count: int,
    progress: Progress | None = None,
) -> Iterator[tuple[Triplets, float]]:
    """Leading triplets of each running product G_i = E_i·…·E_0 of block maps.

    Args:
      block_map: returns E_i; called once for each block, on any thread.
      depth: number of blocks.
      count: triplets of each product.
      progress: called after each block, in the caller's thread.

    Yields:
      The triplets of G_i/c and log c, with c > 0 such that nothing overflows.
    """

    def leading(product: np.ndarray) -> Triplets:
        return leading_triplets(product, count)

    product, log_scale = None, 0.0
    for start in range(0, depth, BLOCKS_AT_ONCE):
        blocks = range(start, min(start + BLOCKS_AT_ONCE, depth))
        products, log_scales = [], []
        for one in in_parallel(block_map, blocks):
            product = one if product is None else one @ product
            norm = np.linalg.norm(product)
            product, log_scale = product / norm, log_scale + np.log(norm)
            products.append(product)
            log_scales.append(log_scale)
        found = zip(in_parallel(leading, products), log_scales, strict=True)
        for done, triplets in enumerate(found, start + 1):
            yield triplets
            if progress is not None:
                progress(done, depth)
