"""Where the large arrays of a repair live: whole on every device, or split over them.

    stacked arrays --fetch--> those of one block, whole --store--> the part kept here
    frozen, state --shard--> their kernels and factors split over the axis of a mesh

A split array is gathered block by block before it is used, so no sum over a contraction
is split and the numbers are those of one device. That needs all devices to ask for the
same block at the same time: the loops of `search` run in step, as far as the longest.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

# Of `Frozen` and `RepairState`: their matrices, stacked over blocks to [L, m, n], are
# split by the last axis. Vectors, and what is not stacked, are whole everywhere.
STACKED = ("merged", "factors", "blocks")


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one device comes by the arrays of a block.

    Attributes:
      axis: name of the mapped axis that arrays are split over; None: all are whole.
      devices: how many there are on it.
    """

    axis: str | None = None
    devices: int = 1

    def fetch(self, stacked: Any, block: Array) -> Any:
        """One block's arrays, whole, out of arrays stacked over blocks.

        Args:
          stacked: arrays [L, ...].
          block: the same on all devices, where arrays are split.
        """
        return jax.tree.map(lambda x: self._whole(at(x, block)), stacked)

    def _whole(self, part: Array) -> Array:
        if self.axis is None or part.ndim < 2:
            return part
        return lax.all_gather(part, self.axis, axis=part.ndim - 1, tiled=True)

    def store(self, stacked: Array, block: Array, value: Array) -> Array:
        """`stacked` with what this device keeps of `value` as block `block`."""
        if self.axis is not None:
            width = stacked.shape[-1]
            start = lax.axis_index(self.axis) * width
            value = lax.dynamic_slice_in_dim(value, start, width, axis=-1)
        return stacked.at[block].set(value)

    def largest(self, x: Array) -> Array:
        """The largest of a number over the devices that must keep in step."""
        return x if self.axis is None else lax.pmax(x, self.axis)

    def smallest(self, x: Array) -> Array:
        """The smallest, likewise."""
        return x if self.axis is None else lax.pmin(x, self.axis)


WHOLE = Placement()
"""Every array is whole on the device that uses it."""


def at(stacked: Array, block: Array) -> Array:
    """Block `block` out of an array stacked over blocks."""
    return lax.dynamic_index_in_dim(stacked, block, keepdims=False)


def partition(tree: Any, axis: str) -> Any:
    """The `PartitionSpec` of every array of `Frozen` or `RepairState`."""

    def spec(path: Any, x: Any) -> PartitionSpec:
        names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
        is_split = x.ndim == 3 and not names.isdisjoint(STACKED)
        return PartitionSpec(None, None, axis) if is_split else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def axis_of(sharding: NamedSharding) -> tuple[Any, str]:
    """Mesh and name of the axis that a sharding of the images splits.

    Raises:
      ValueError: it is no `NamedSharding` whose spec names exactly one axis.
    """
    spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
    if len(spec) != 1 or not isinstance(spec[0], str):
        raise ValueError(
            "sharding must be that of the images' first axis, NamedSharding(mesh, "
            f"PartitionSpec(axis)); got {sharding}."
        )
    return sharding.mesh, spec[0]


def shard(tree: Any, sharding: NamedSharding) -> Any:
    """Kernels and factors split over the devices of a mesh, all else on each of them.

    Args:
      tree: `Frozen` or `RepairState` from `repair.init`.
      sharding: of the images, as given to `repair.make_step`.

    Raises:
      ValueError: another sharding, or a width that the devices do not divide.
    """
    mesh, axis = axis_of(sharding)
    devices = mesh.shape[axis]
    specs = partition(tree, axis)
    for spec, x in zip(jax.tree.leaves(specs), jax.tree.leaves(tree), strict=True):
        if spec and x.shape[-1] % devices:
            raise ValueError(
                f"{devices} devices do not divide the width {x.shape[-1]} of a kernel: "
                "choose a number that does."
            )

    def put(x: Any, spec: PartitionSpec) -> Array:
        # From a callback: of several processes, each places what its devices keep.
        host = np.asarray(x)
        placed = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(host.shape, placed, lambda at: host[at])

    return jax.tree.map(put, tree, specs)


def unshard(tree: Any) -> Any:
    """Whole arrays on the host from what `shard` split, gathered block by block.

    All processes must call it together.
    """

    def whole(x: Any) -> np.ndarray:
        if x.is_fully_replicated:
            return np.asarray(x.addressable_shards[0].data)
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        gather = jax.jit(at, out_shardings=everywhere)
        blocks = (
            gather(x, block).addressable_shards[0].data for block in range(len(x))
        )
        return np.stack([np.asarray(block) for block in blocks])

    return jax.tree.map(whole, tree)
