"""Where the arrays of a repair live: whole on every device, or split over them.

    tree --replicate--> a copy on each device     tree --shard--> a part on each device
    stacked arrays --fetch--> those of one block, whole --store--> the part kept here
    tree, replicated or split --gather--> whole arrays on the host

A split array is gathered block by block before it is used, so no sum over a contraction
is split and the numbers are those of one device. All devices must then ask for the same
block at the same time: the loops of `search` run in step, for as long as the longest.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXIS = "images"
# Of `Frozen` and `RepairState`: their matrices, stacked over blocks to [L, m, n], are
# split by the last axis. Vectors, and what is not stacked, are whole everywhere.
STACKED = ("merged", "factors", "blocks")


def on_host() -> AbstractContextManager[Any]:
    """Arrays made in this block stay on the host, and are computed there.

    One device may be too small, or compute no float64.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was started without a CPU backend
        return nullcontext()


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one device gets the arrays of a block.

    Attributes:
      axis: name of the mesh axis that arrays are split over; None: all are whole.
    """

    axis: str | None = None

    def fetch(self, stacked: Any, block: Array) -> Any:
        """One block's arrays, whole, out of arrays stacked over blocks.

        Args:
          stacked: arrays [L, ...].
          block: if arrays are split, the same on all devices.
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


# --- Several devices ------------------------------------------------------------------


def over(devices: Sequence[jax.Device] | None = None) -> NamedSharding:
    """The sharding that gives each device its share of a step's images.

    Args:
      devices: None means all, sorted so that each process gets consecutive images.
    """
    if devices is None:
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def first() -> jax.Device:
    """The device that takes the first images, for what needs no second one."""
    return over().mesh.devices.flat[0]


def axis_of(sharding: NamedSharding) -> tuple[Any, str]:
    """Mesh and name of the axis that a sharding of the images splits.

    Raises:
      ValueError: not a `NamedSharding` whose spec names exactly one axis.
    """
    spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
    if len(spec) != 1 or not isinstance(spec[0], str):
        raise ValueError(
            f"got sharding {sharding}, expected that of the images' first axis; pass "
            "NamedSharding(mesh, PartitionSpec(axis))"
        )
    return sharding.mesh, spec[0]


def partition(tree: Any, axis: str) -> Any:
    """The `PartitionSpec` of every array of a split `Frozen` or `RepairState`."""

    def spec(path: Any, x: Any) -> PartitionSpec:
        names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
        is_split = x.ndim == 3 and not names.isdisjoint(STACKED)
        return PartitionSpec(None, None, axis) if is_split else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shard(tree: Any, sharding: NamedSharding) -> Any:
    """Splits kernels and factors over the devices of a mesh; copies all else to each.

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
                f"{devices} devices do not divide the width {x.shape[-1]} of a kernel; "
                "use a number of devices that does"
            )
    return jax.tree.map(lambda x, spec: _put(x, NamedSharding(mesh, spec)), tree, specs)


def replicate(
    tree: Any, devices: Sequence[jax.Device] | None = None, *, copy: bool = True
) -> Any:
    """Copies every array to each device.

    Args:
      tree: arrays; the same in each process.
      devices: as for `repair.make_pmapped_step`.
      copy: if False, a single device may take over the memory of `tree`.
    """
    everywhere = NamedSharding(over(devices).mesh, PartitionSpec())
    if everywhere.num_devices == 1 and not copy:
        return jax.device_put(tree, everywhere)
    return jax.tree.map(lambda x: _put(x, everywhere), tree)


def _put(x: Any, sharding: NamedSharding) -> Array:
    host = np.asarray(x)
    # From a callback: of several processes, each places what its devices keep. In
    # memory of its own, because a step reuses that of its state.
    return jax.make_array_from_callback(
        host.shape, sharding, lambda index: np.array(host[index])
    )


def unreplicate(tree: Any) -> Any:
    """The copy of each array on this process's first device."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def gather(tree: Any) -> Any:
    """Whole arrays on the host, of arrays on one device, replicated or split.

    Split arrays are gathered block by block; all processes must then call together.
    """

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_shards[0].data)
        sharding: Any = x.sharding
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        fetch = jax.jit(at, out_shardings=everywhere)
        blocks = (fetch(x, block).addressable_shards[0].data for block in range(len(x)))
        return np.stack([np.asarray(block) for block in blocks])

    return jax.tree.map(whole, tree)
