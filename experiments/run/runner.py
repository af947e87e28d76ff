"""The state of a repair and the step that moves it, on one device or several.

    frozen, state --replicate | shard--> on the devices
    batch of each process --step--> metrics of all images

The devices may belong to several processes: each of them makes a Runner and steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sinder_jax import placement, repair, vit
from sinder_jax.data import batches


def choose_devices(images_per_step: int, processes: int) -> tuple[jax.Device, ...]:
    """As many devices as share a step's images evenly, the same number per process.

    Raises:
      ValueError: the processes cannot share them evenly.
    """
    if images_per_step % processes:
        raise ValueError(
            f"config.images_per_step={images_per_step} must be a multiple of the "
            f"{processes} processes"
        )
    per_process = math.gcd(images_per_step // processes, jax.local_device_count())
    chosen: list[jax.Device] = []
    for process in range(processes):
        own = jax.local_devices(process)
        chosen += sorted(own, key=lambda device: device.id)[:per_process]
    return tuple(chosen)


class Runner:
    """Moves the state of a repair on one device or several.

    Args:
      model: the architecture.
      options: of the step.
      frozen, state: from `repair.init` or `repair.from_saved`, on the host or a device;
        their memory now belongs to the runner.
      devices: from `choose_devices`.
      split: True to split kernels and factors over the devices instead of copying them.
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
        self._sharding = placement.over(devices)
        self._step = repair.make_step(model, options, self._sharding, split=split)
        self._frozen, self._state = (
            placement.shard(tree, self._sharding)
            if split
            else placement.replicate(tree, devices, copy=False)
            for tree in (frozen, state)
        )

    def step(self, batch: batches.Batch) -> repair.Metrics:
        """Dispatches a step and returns the metrics of all images without waiting.

        Args:
          batch: this process's part of the step's images.
        """
        images, valid = (
            jax.make_array_from_process_local_data(self._sharding, x)
            for x in (batch.images, batch.valid)
        )
        self._state, metrics = self._step(self._state, self._frozen, images, valid)
        return metrics

    def saved(self) -> dict[str, Any]:
        """What must be stored to resume, as host arrays (`repair.to_saved`)."""
        return jax.tree.map(np.array, placement.gather(repair.to_saved(self._state)))

    def params(self) -> dict[str, Any]:
        """The params as repaired so far (`repair.merged_params`).

        If the model is split over several processes, all must call together.
        """
        return repair.merged_params(self._frozen, self._state)
