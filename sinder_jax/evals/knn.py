"""k-nearest-neighbor classification by cosine similarity, exact, of any size.

    bank [N, D], queries [Q, D] --neighbors, tile by tile--> the k nearest rows of each
    cosines, labels --votes--> {K: votes [Q, C]} for every K in one pass

Source: dinov2/eval/knn.py. The bank stays on the host, or on a disk as a memory map;
each device looks through its own consecutive part of it, a tile at a time. Of equal
cosines the row with the lower index is nearer. The product is that of a block of
queries and a block of rows, always of the same shape and at the same place of the bank,
so neither tiles nor the number of devices change a bit of a cosine.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int32

from sinder_jax import placement

KS = (10, 20, 100, 200)  # SINDER's, appendix G.3
TEMPERATURE = 0.07
LEAST_NORM = 1e-12  # a zero feature has cosine 0 with everything
TEMPERATURES = (1e-30, 1e30)  # beyond them float32 has no quotient
TILE = 65_536  # rows of the bank that a device compares at a time
BLOCK = 2_048  # rows of one product ...
QUERIES = 512  # ... with so many queries
GROUP = 16  # rows, of which the largest cosine is looked at first


class Neighbors(NamedTuple):
    """The k nearest rows of each query, nearest first.

    Attributes:
      cosines: their cosine similarities, float32.
      rows: their indices in the bank.
    """

    cosines: Float32[np.ndarray, "Q k"]
    rows: Int32[np.ndarray, "Q k"]


def classify(
    bank: Any,
    bank_labels: Any,
    queries: Any,
    *,
    ks: Sequence[int] | Int[np.ndarray, " K"] = KS,
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    tile: int = TILE,
) -> dict[int, Float32[np.ndarray, "Q C"]]:
    """Votes of the K nearest rows for each class; the largest vote is the prediction.

    A neighbor's vote is the softmax of cosine / temperature over the largest K, also
    for a smaller one: `p_K[c] = Σ_{j<=K} w_j·1[y_j = c]` sums to less than 1 then.

    Args:
      bank: features as they come, [N, D]; NumPy (a memory map too) or JAX.
      bank_labels: integers [N], 0 to C-1.
      queries: features as they come, [Q, D].
      ks: numbers of neighbors, at most N.
      temperature: of the softmax, 1e-30 to 1e30.
      num_classes: C; None: the largest label plus 1.
      devices: None means all.
      tile: rows of the bank that a device compares at a time, at most, in whole
        blocks of 2,048 (at least one).

    Returns:
      By K, the votes. Of classes with the same vote, `argmax` takes the lowest.

    Raises:
      ValueError: shapes or types that do not fit, a K beyond the bank, a label beyond
        the classes, a feature that is not finite.
    """
    labels = _checked_labels(bank_labels, len(bank), num_classes)
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    ks = [operator.index(k) for k in ks]
    check_ks(ks, len(bank))
    check_temperature(temperature)
    found = neighbors(bank, queries, max(ks), devices=devices, tile=tile)
    return votes(
        found.cosines,
        labels[found.rows],
        ks=ks,
        temperature=temperature,
        num_classes=classes,
    )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless a temperature is one of `TEMPERATURES`."""
    least, most = TEMPERATURES
    if not least <= temperature <= most:
        raise ValueError(
            f"got temperature={temperature}, expected a number from {least:g} to "
            f"{most:g}"
        )


def check_ks(ks: Sequence[int], rows: int) -> None:
    """Raises ValueError unless each K is at least 1 and at most `rows`, the bank's."""
    if not ks or min(ks) < 1:
        raise ValueError(f"got ks={tuple(ks)}, expected numbers of at least 1")
    if max(ks) > rows:
        raise ValueError(
            f"got K = {max(ks)}, but the bank has only {rows} rows: use a smaller K or "
            "a larger bank"
        )


def _checked_labels(
    labels: Any, rows: int, num_classes: int | None
) -> Int32[np.ndarray, " N"]:
    labels = np.asarray(labels)
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"got labels {labels.shape} of {labels.dtype} for a bank of {rows} rows, "
            f"expected {rows} integers"
        )
    if not rows:
        raise ValueError("got an empty bank, expected at least one row")
    most = np.iinfo(np.int32).max if num_classes is None else num_classes
    for label in (labels.min(), labels.max()):
        if not 0 <= label < most:
            raise ValueError(
                f"got the label {label}, expected 0 to {most - 1}: num_classes={most}"
            )
    return labels.astype(np.int32)


def neighbors(
    bank: Any,
    queries: Any,
    k: int,
    *,
    devices: Sequence[jax.Device] | None = None,
    tile: int = TILE,
) -> Neighbors:
    """The k rows of the bank with the largest cosine to each query.

    Args:
      bank: [N, D], as for `classify`.
      queries: [Q, D].
      k: at most N.
      devices: None means all.
      tile: rows of the bank that a device compares at a time, at most, in whole
        blocks of 2,048 (at least one).

    Raises:
      ValueError: shapes that do not fit, k beyond the bank, a feature that is not
        finite.
    """
    bank, queries = np.asarray(bank), np.asarray(queries)  # no copy of a memory map
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"got a bank {bank.shape} and queries {queries.shape}, expected [N, D] and "
            "[Q, D] of the same width: are they features of the same model?"
        )
    check_ks([k], len(bank))
    sharding = placement.over(devices)
    mesh, _ = placement.axis_of(sharding)
    part, tile = _shares(len(bank), mesh.size, tile)
    placed = jax.device_put(
        _blocks_of(_finite(queries, "query"), QUERIES),
        NamedSharding(mesh, PartitionSpec()),
    )
    shape = (mesh.size, *placed.shape[:2], k)
    best = jax.device_put(
        (np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32)), sharding
    )
    starts = np.arange(mesh.size) * part
    step = _make_step(mesh)
    for first in range(0, part, tile):
        rows = np.zeros((mesh.size, tile, bank.shape[1]), np.float32)
        counts = np.zeros(mesh.size, np.int32)
        for device, start in enumerate(starts):
            begin = start + first
            some = bank[begin : min(begin + tile, start + part)]
            rows[device, : len(some)] = _finite(some, "row of the bank")
            counts[device] = len(some)
        firsts = (starts + first).astype(np.int32)
        best = step(best, placed, *jax.device_put((rows, firsts, counts), sharding))
    cosines, rows = (np.asarray(x).reshape(mesh.size, -1, k) for x in best)
    return _merged(cosines[:, : len(queries)], rows[:, : len(queries)])


def _finite(features: Any, what: str) -> Float32[np.ndarray, "n D"]:
    array = np.asarray(features, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"got a {what} that is not finite, expected finite features")
    return array


def _shares(rows: int, devices: int, tile: int) -> tuple[int, int]:
    """Rows of a device, and of its tiles, all of one size: whole blocks."""
    part = _ceil(_ceil(rows, BLOCK), devices)
    count = _ceil(part, max(tile // BLOCK, 1))
    return part * BLOCK, _ceil(part, count) * BLOCK


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _blocks_of(rows: np.ndarray, size: int) -> Float32[np.ndarray, "blocks size D"]:
    """Rows in blocks of the same size, the last one filled up with zeros."""
    filled = np.zeros((_ceil(len(rows), size) * size, rows.shape[1]), np.float32)
    filled[: len(rows)] = rows
    return filled.reshape(-1, size, rows.shape[1])


@functools.cache
def _make_step(mesh: Any) -> Any:
    """Compares all queries with one tile of the bank on each device."""

    def own(best, queries, rows, first, count):
        rows, first, count = rows[0], first[0], count[0]
        blocks = lax.map(_normalized, rows.reshape(-1, BLOCK, rows.shape[1]))
        starts = jnp.arange(len(blocks)) * BLOCK

        def of_some(arguments):
            cosines, indices, some = arguments
            some = _normalized(some)

            def of_block(block):
                rows, start = block
                product = jnp.matmul(some, rows.T, precision="highest")
                valid = start + jnp.arange(BLOCK) < count
                return jnp.where(valid[None], product, -jnp.inf)

            product = lax.map(of_block, (blocks, starts))
            return _keep(cosines, indices, product, first)

        cosines, indices = (x[0] for x in best)
        cosines, indices = lax.map(of_some, (cosines, indices, queries))
        return cosines[None], indices[None]

    share, everywhere = PartitionSpec(placement.AXIS), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(share, everywhere, share, share, share),
            out_specs=share,
            check_vma=False,
        ),
        donate_argnums=0,
    )


def _normalized(features: Float[Array, "n D"]) -> Float[Array, "n D"]:
    """Rows of length 1; squares of huge features would overflow, hence the scale."""
    largest = jnp.max(jnp.abs(features), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1)
    norm = scale * jnp.linalg.norm(features / scale, axis=-1, keepdims=True)
    return features / jnp.maximum(norm, LEAST_NORM)


def _keep(
    cosines: Float[Array, "q k"],
    indices: Int[Array, "q k"],
    product: Float[Array, "blocks q rows"],
    first: Int[Array, ""],
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """The k best of those before and those of a tile; of equal ones, the earlier."""
    k = cosines.shape[1]
    some, rows = _candidates(product, k)
    joined = jnp.concatenate([cosines, some], axis=1)
    where = jnp.concatenate([indices, rows + first], axis=1)
    best, places = lax.top_k(joined, k)
    return best, jnp.take_along_axis(where, places, axis=1)


def _candidates(
    product: Float[Array, "blocks q rows"], k: int
) -> tuple[Float[Array, "q some"], Int[Array, "q some"]]:
    """Cosines and rows, in the order of the rows, that hold the k best of a tile.

    They are those of the k groups with the largest maxima. Before any row of another
    group come these k maxima: each is larger or, as `top_k` prefers the earlier of
    equal groups, equal and earlier.
    """
    blocks, q, size = product.shape
    if blocks * size // GROUP < 2 * k:  # too few to gain by it
        joined = jnp.moveaxis(product, 0, 1).reshape(q, -1)
        return joined, jnp.broadcast_to(jnp.arange(blocks * size)[None], joined.shape)
    grouped = product.reshape(blocks, q, -1, GROUP)
    largest = jnp.moveaxis(jnp.max(grouped, axis=3), 0, 1).reshape(q, -1)
    _, chosen = lax.top_k(largest, k)
    chosen = jnp.sort(chosen, axis=1)
    block, group = jnp.divmod(chosen, size // GROUP)
    some = grouped[block, jnp.arange(q)[:, None], group]
    rows = chosen[:, :, None] * GROUP + jnp.arange(GROUP)[None, None]
    return some.reshape(q, -1), rows.reshape(q, -1)


def _merged(
    cosines: Float32[np.ndarray, "devices Q k"], rows: Int32[np.ndarray, "devices Q k"]
) -> Neighbors:
    """The k best of all devices; their parts are consecutive, so order breaks ties."""
    k = cosines.shape[2]
    cosines, rows = (np.concatenate(list(x), axis=1) for x in (cosines, rows))
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return Neighbors(
        np.take_along_axis(cosines, order, axis=1),
        np.take_along_axis(rows, order, axis=1),
    )


def votes(
    cosines: Float32[np.ndarray, "Q k"],
    labels: Int32[np.ndarray, "Q k"],
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> dict[int, Float32[np.ndarray, "Q C"]]:
    """Votes of the nearest rows, from the nearest to the farthest.

    Args:
      cosines: of the k nearest rows, nearest first; k is the largest of `ks`.
      labels: their labels.
      ks: numbers of neighbors that vote.
      temperature: 1e-30 to 1e30.
      num_classes: C.

    Raises:
      ValueError: a temperature beyond `TEMPERATURES`.
    """
    check_temperature(temperature)
    logits = cosines / np.float32(temperature)
    weights = np.exp(logits - logits[:, :1])
    weights /= weights.sum(axis=1, keepdims=True)
    total = np.zeros((len(cosines), num_classes), np.float32)
    queries, found, before = np.arange(len(cosines))[:, None], {}, 0
    for k in sorted(set(ks)):
        some = slice(before, k)
        np.add.at(total, (queries, labels[:, some]), weights[:, some])
        found[k], before = total.copy(), k
    return {k: found[k] for k in ks}
