"""The repair step: the images' gradients in order, SGD on ε, kernels merged again.

    images --search.image_results, one after the other--> defects, ∂loss/∂ε
    all images of a step, in order --SGD with momentum, select--> ε --merge--> kernels

This is the authors' training loop without the work it throws away: kernels stay merged,
only the blocks that changed are merged again, and nothing is computed that no ε needs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sinder_jax import factor, placement
from sinder_jax.factor import Factors
from sinder_jax.placement import WHOLE, Placement
from sinder_jax.placement import replicate as replicate
from sinder_jax.placement import shard as shard
from sinder_jax.placement import unreplicate as unreplicate
from sinder_jax.search import ImageResult, image_results
from sinder_jax.state import Frozen as Frozen
from sinder_jax.state import Kernels
from sinder_jax.state import RepairOptions as RepairOptions
from sinder_jax.state import RepairState as RepairState
from sinder_jax.state import from_saved as from_saved
from sinder_jax.state import init as init
from sinder_jax.state import merged_params as merged_params
from sinder_jax.state import to_saved as to_saved
from sinder_jax.vit import ViTConfig


class Metrics(NamedTuple):
    """What a step reports: B images in order, then the state after the step.

    Attributes:
      layer: block of the first defect, -1 without a defect.
      loss: neighbor loss before the update, nan without a defect.
      alpha: mean token norm by which the loss was divided, nan without a defect.
      num_outliers: outliers in the defect's block, 0 without a defect.
      finite: True if tokens, loss and gradient were finite; else the image is ignored.
      counted: True if the image took part: it was valid and the run was not yet done.
      num_images: images passed so far.
      skipped: share of the last images without a defect, 0 to 1.
      num_bad: images so far that were not finite (`finite` False).
      bad_in_row: how many of the last images were not finite, in a row.
      done: True if the stopping rule holds.
    """

    layer: Int[Array, " B"]
    loss: Float[Array, " B"]
    alpha: Float[Array, " B"]
    num_outliers: Int[Array, " B"]
    finite: Bool[Array, " B"]
    counted: Bool[Array, " B"]
    num_images: Int[Array, ""]
    skipped: Float[Array, ""]
    num_bad: Int[Array, ""]
    bad_in_row: Int[Array, ""]
    done: Bool[Array, ""]


Step = Callable[..., tuple[RepairState, Metrics]]


@functools.lru_cache
def make_step(
    config: ViTConfig,
    options: RepairOptions,
    sharding: NamedSharding | None = None,
    *,
    split: bool = True,
) -> Step:
    """The jitted repair step, on one device or on several.

    The images of a device run one after the other; their ε-gradients are gathered and
    summed in image order on every device. So 1, 2, 4 and 8 devices that share a step's
    images give the same bits, for one kind of device (`tests/sinder_jax/test_devices`).
    The devices may belong to several processes, all of which call the step.

    Args:
      config: the architecture.
      options: the options.
      sharding: None for one device. For several, how the images' first axis is split,
        NamedSharding(mesh, PartitionSpec(axis)); it must divide the number of images.
      split: with a sharding, whether the model is split over the devices too, for one
        that is too large for a device: state and frozen are then from `shard`, and a
        device gathers a block before it uses it. If False, they are from `replicate`.

    Returns:
      step(state, frozen, images, valid=None) -> (state, `Metrics`). images [B, height,
      width, 3] normalized float32, each its own reference step, run one after the
      other; valid [B] marks images that take part. The state passed in is donated.
      Once the stopping rule holds, a step changes nothing.

    Raises:
      ValueError: a sharding of another kind.
    """
    mesh, axis = (None, "") if sharding is None else placement.axis_of(sharding)
    place = Placement(axis) if mesh is not None and split else WHOLE

    def own_step(state, frozen, images, valid):
        results = image_results(config, options, state, frozen, images, place)
        if mesh is not None:
            results, valid = lax.all_gather((results, valid), axis, tiled=True)
        return _update(options, state, frozen, results, valid, place)

    def step(state, frozen, images, valid=None):
        valid = jnp.ones(images.shape[0], bool) if valid is None else valid
        if mesh is None:
            return own_step(state, frozen, images, valid)
        if images.shape[0] % mesh.shape[axis]:
            raise ValueError(
                f"got {images.shape[0]} images per step for {mesh.shape[axis]} "
                "devices; use a multiple of the devices"
            )
        everywhere, share = PartitionSpec(), PartitionSpec(axis)
        states, frozens = (
            placement.partition(tree, axis) if split else everywhere
            for tree in (state, frozen)
        )
        return jax.shard_map(
            own_step,
            mesh=mesh,
            in_specs=(states, frozens, share, share),
            out_specs=(states, everywhere),
            check_vma=False,
        )(state, frozen, images, valid)

    return jax.jit(step, donate_argnums=0)


def make_pmapped_step(
    config: ViTConfig,
    options: RepairOptions,
    devices: Sequence[jax.Device] | None = None,
) -> Step:
    """`make_step` on several devices that each hold the model; images by device.

    Args:
      config: the architecture.
      options: the options.
      devices: None means all, in the order of `placement.over`.

    Returns:
      step(state, frozen, images, valid=None) as in `make_step`, with state and frozen
      from `replicate`, images [devices, per_device, height, width, 3] and valid
      [devices, per_device]; of several processes, each passes those of its own devices.
      Metrics are those of all devices, with the leading axes [devices, per_device], or
      [devices] where they describe the state.
    """
    return _pmapped_step(config, options, placement.over(devices))


@functools.lru_cache
def _pmapped_step(
    config: ViTConfig, options: RepairOptions, sharding: NamedSharding
) -> Step:
    number = sharding.num_devices
    step = make_step.__wrapped__(config, options, sharding, split=False)

    def by_image(x):
        x = np.asarray(x)
        flat = x.reshape(-1, *x.shape[2:])
        return jax.make_array_from_process_local_data(sharding, flat)

    def by_device(x):
        return x.reshape(number, -1) if x.ndim else jnp.broadcast_to(x, number)

    def call(state, frozen, images, valid=None):
        valid = np.ones(images.shape[:2], bool) if valid is None else valid
        state, metrics = step(state, frozen, by_image(images), by_image(valid))
        return state, jax.tree.map(by_device, unreplicate(metrics))

    return call


# --- The update -----------------------------------------------------------------------


def _update(
    options: RepairOptions,
    state: RepairState,
    frozen: Frozen,
    results: ImageResult,
    valid: Bool[Array, " B"],
    place: Placement,
) -> tuple[RepairState, Metrics]:
    """State and metrics after a step, from the results of its images in order."""
    counts, counted = _count(options, state, results, valid)
    used = counted & results.finite & (results.layer >= 0)
    gradients, touched = _reduce(options.reduce, results, used)

    # Selected, not zeroed: momentum would still move an ε whose gradient is zero, while
    # PyTorch leaves a parameter without a gradient alone, its momentum included.
    def select(new, old):
        return jax.tree.map(lambda n, o: jnp.where(touched[:, None], n, o), new, old)

    trace = optax.trace(decay=options.momentum)
    velocity, _ = trace.update(gradients, optax.TraceState(state.momentum))
    momentum = select(velocity, state.momentum)
    stepped = jax.tree.map(lambda e, m: e - options.lr * m, state.eps, momentum)
    eps = select(stepped, state.eps)
    merged = _merge_touched(frozen.factors, eps, state.merged, touched, place)
    state = dataclasses.replace(counts, eps=eps, momentum=momentum, merged=merged)
    return state, Metrics(
        *results[:5],  # up to `finite`
        counted=counted,
        num_images=state.num_images,
        skipped=jnp.mean(~state.had_defect),
        num_bad=state.num_bad,
        bad_in_row=state.bad_in_row,
        done=is_done(options, state),
    )


def is_done(options: RepairOptions, state: RepairState) -> Bool[Array, ""]:
    """The stopping rule: `max_iter` images, or enough of the last had no defect."""
    # In floats 0.07·100 exceeds 7, for one.
    needed = math.ceil(options.stop_share * options.history - 1e-9)
    return (state.num_images >= options.max_iter) | (
        jnp.sum(~state.had_defect) >= needed
    )


def _count(
    options: RepairOptions,
    state: RepairState,
    results: ImageResult,
    valid: Bool[Array, " B"],
) -> tuple[RepairState, Bool[Array, " B"]]:
    """Passes the images one by one through the stopping rule.

    Images after the one at which the rule began to hold do not count; an invalid image
    only advances the position; one that is not finite counts as having a defect.

    Returns:
      (state with new counts but without ε, momentum and kernels; True for each image
      that counts).
    """

    def step(state, image):
        layer, finite, valid = image
        running = ~is_done(options, state)
        counts = running & valid
        bad = counts & ~finite
        slot = state.num_counted % options.history
        had_defect = state.had_defect.at[slot].set((layer >= 0) | bad)
        state = dataclasses.replace(
            state,
            num_images=state.num_images + running,
            had_defect=jnp.where(counts, had_defect, state.had_defect),
            num_counted=state.num_counted + counts,
            num_bad=state.num_bad + bad,
            bad_in_row=jnp.where(
                counts, (state.bad_in_row + 1) * bad, state.bad_in_row
            ),
        )
        return state, counts

    # The kernels do not travel through the loop.
    light = dataclasses.replace(state, eps={}, momentum={}, merged={})
    return lax.scan(step, light, (results.layer, results.finite, valid))


def _reduce(
    reduce: str, results: ImageResult, used: Bool[Array, " B"]
) -> tuple[Kernels, Bool[Array, " L"]]:
    """Sums the gradients of each block over the images whose window contains it.

    In the order of the images, so that the sum does not depend on the devices.

    Returns:
      (gradients by kernel [L, S], touched [L]: blocks in the window of any used image).
    """
    takes_part = results.window & used[:, None]

    def add(total, image):
        gradients, takes_part = image
        return {
            name: total[name] + jnp.where(takes_part[:, None], gradients[name], 0.0)
            for name in total
        }, None

    zeros = {name: jnp.zeros_like(g[0]) for name, g in results.gradients.items()}
    total, _ = lax.scan(add, zeros, (results.gradients, takes_part))
    images = jnp.sum(takes_part, axis=0)
    if reduce == "mean":
        divisor = jnp.maximum(images, 1)[:, None]
        total = {name: gradient / divisor for name, gradient in total.items()}
    return total, images > 0


def _merge_touched(
    factors: Factors, eps: Kernels, merged: Kernels, touched: Array, place: Placement
) -> Kernels:
    """`merged` with the kernels of the touched blocks rebuilt from their ε.

    A block whose ε is still all zero keeps its original bits.
    """
    moved = jnp.any(jnp.stack([jnp.any(e != 0, axis=1) for e in eps.values()]), axis=0)
    changed = touched & moved
    order = jnp.flatnonzero(changed, size=len(changed), fill_value=0)

    def merge(position, merged):
        block = order[position]
        whole = place.fetch({"u": factors.u, "v": factors.v}, block)

        def rebuilt(name):
            s = factors.sigma[name][block] + eps[name][block]
            return factor.merge_kernel(whole["u"][name], s, whole["v"][name])

        return {
            name: place.store(merged[name], block, rebuilt(name)) for name in merged
        }

    return lax.fori_loop(0, jnp.sum(changed), merge, merged)
