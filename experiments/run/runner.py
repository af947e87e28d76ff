"""The state of a repair and the step that moves it, wherever the devices are.

    one device: `make_step`     several, model on each: `make_pmapped_step`
    several, model split over them: `make_step(sharding=)`

The devices may belong to several processes: all of them make a Runner and step.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sinder_jax import placement, repair, vit
from sinder_jax.data import batches

AXIS = "images"


def choose_devices(images_per_step: int, processes: int) -> tuple[jax.Device, ...]:
    """As many devices as share the images of a step evenly, the same of each process.

    Raises:
      ValueError: not even the processes share them evenly.
    """
    if images_per_step % processes:
        raise ValueError(
            f"config.images_per_step={images_per_step} must be a multiple of the "
            f"{processes} processes"
        )
    per_process = math.gcd(images_per_step // processes, jax.local_device_count())
    chosen: list[jax.Device] = []
    for process in range(processes):
        own = (d for d in jax.devices() if d.process_index == process)
        chosen += sorted(own, key=lambda device: device.id)[:per_process]
    return tuple(chosen)


class Runner:
    """Moves the state of a repair on one device or several.

    Args:
      model: the architecture.
      options: of the step.
      frozen, state: from `repair.init` or `repair.from_saved`, on the host or a device.
      devices: from `choose_devices`.
      split: whether kernels and factors are split over them instead of copied.
    """

    def __init__(
        self,
        model: vit.ViTConfig,
        options: repair.RepairOptions,
        frozen: repair.Frozen,
        state: repair.RepairState,
        devices: Sequence[jax.Device],
        *,
        split: bool = False,
    ):
        self._devices, self._sharding = tuple(devices), None
        if len(devices) > 1 and split:
            self._sharding = NamedSharding(Mesh(devices, AXIS), PartitionSpec(AXIS))
            self._step = repair.make_step(model, options, self._sharding)
            frozen = repair.shard(frozen, self._sharding)
            state = repair.shard(state, self._sharding)
        elif len(devices) > 1:
            self._step = repair.make_pmapped_step(model, options, self._devices)
            frozen = repair.replicate(frozen, self._devices)
            state = repair.replicate(state, self._devices)
        else:
            self._step = repair.make_step(model, options)
            frozen, state = jax.device_put((frozen, state), devices[0])
        self._frozen, self._state = frozen, state

    def step(self, batch: batches.Batch) -> repair.Metrics:
        """Dispatches a step; its metrics, of all images, are not waited for.

        Args:
          batch: this process's part of the step's images.
        """
        images, valid = batch.images, batch.valid
        if self._sharding is not None:
            images, valid = (
                jax.make_array_from_process_local_data(self._sharding, x)
                for x in (images, valid)
            )
        elif len(self._devices) > 1:
            here = sum(d.process_index == jax.process_index() for d in self._devices)
            images, valid = (x.reshape(here, -1, *x.shape[1:]) for x in (images, valid))
        self._state, metrics = self._step(self._state, self._frozen, images, valid)
        return metrics

    def saved(self) -> dict[str, Any]:
        """What must be stored to go on, as host arrays (`repair.to_saved`)."""
        return jax.tree.map(self._one, repair.to_saved(self._state))

    def params(self) -> dict[str, Any]:
        """The params as repaired so far (`repair.merged_params`).

        All processes must ask together where the model is split.
        """
        frozen, state = self._frozen, self._state
        if self._sharding is not None:
            frozen, state = placement.unshard(frozen), placement.unshard(state)
        elif len(self._devices) > 1:
            frozen, state = repair.unreplicate((frozen, state))
        return repair.merged_params(frozen, state)

    def _one(self, x: Any) -> np.ndarray:
        """A number that every device holds, from the first here."""
        mapped = len(self._devices) > 1 and self._sharding is None
        own = x.addressable_shards[0].data
        return np.array(own[0] if mapped else own)
