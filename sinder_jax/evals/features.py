"""Features of a frozen model, for all evaluations: one jitted pass over all devices.

    images [B, height, width, 3] --ViT, blocks wanted--> cls [n, B, D], patches
                                                         [n, B, H, W, D]

`make_extract` puts the weights on every device once. A device takes its images in
groups of a fixed size, one group after the other, so the features of an image are the
same bytes on 1, 2 or 4 devices of a kind.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from sinder_jax import families, layers, placement, vit
from sinder_jax.vit import Images, ViTConfig

Run = Callable[[ViTConfig, Any, Images, tuple[int, ...]], Any]
"""Another forward pass, see `extract`."""


class BlockFeatures(NamedTuple):
    """Tokens of chosen blocks, in the order in which the blocks were given.

    Attributes:
      cls: class tokens.
      patches: patch tokens, as a grid of H rows and W columns; without registers.
    """

    cls: Float[Array, "n B D"]
    patches: Float[Array, "n B H W D"]


def last_blocks(config: ViTConfig, count: int) -> tuple[int, ...]:
    """The last `count` blocks of a model, oldest first.

    Raises:
      ValueError: the model has fewer.
    """
    if not 1 <= count <= config.depth:
        raise ValueError(
            f"got the last {count} blocks of a model with {config.depth}, expected 1 "
            f"to {config.depth}"
        )
    return tuple(range(config.depth - count, config.depth))


def extract(
    config: ViTConfig,
    params: Any,
    images: Images,
    *,
    blocks: Sequence[int],
    norm: bool = True,
    precision: Any = "highest",
    run: Run | None = None,
) -> BlockFeatures:
    """Tokens after the given blocks (dinov2 `get_intermediate_layers`).

    Args:
      config: the architecture.
      params: its params tree.
      images: normalized by `families.of(config).statistics`; both sides multiples of
        the patch size.
      blocks: indices from 0 to L-1, in any order.
      norm: applies the model's final LayerNorm to the tokens of every block; False
        returns them raw.
      precision: of every matrix product.
      run: (config, params, images, blocks) -> raw tokens after these blocks, for a
        forward pass of another kind, whose precision is its own; None: the model's.

    Returns:
      float32 features.

    Raises:
      ValueError: a block that does not exist, or a side that does not fit.
    """
    rows, columns = vit.patch_grid(config, *images.shape[1:3])
    kept: Any
    if run is None:
        kept = vit.ViT(config, precision=precision).apply(
            {"params": params}, images, blocks=tuple(blocks), method="intermediates"
        )
    else:
        kept = run(config, params, images, tuple(blocks))
    if norm:
        final = layers.LayerNorm(families.of(config).norm_epsilon)
        kept = [final.apply({"params": params["norm"]}, tokens) for tokens in kept]
    split = [vit.split_tokens(config, tokens, rows, columns) for tokens in kept]
    return BlockFeatures(
        jnp.stack([cls for cls, _, _ in split]),
        jnp.stack([patches for _, _, patches in split]),
    )


def class_token(features: BlockFeatures) -> Float[Array, "B D"]:
    """The class token of the last of the blocks, the feature of k-NN."""
    return features.cls[-1]


def make_extract(
    config: ViTConfig,
    params: Any,
    *,
    blocks: Sequence[int],
    norm: bool = True,
    of: Callable[[BlockFeatures], Any] = lambda features: features,
    batch_axis: int = 1,
    group: int = 1,
    devices: Sequence[jax.Device] | None = None,
    precision: Any = "highest",
    run: Run | None = None,
) -> Callable[[Any], Any]:
    """`extract` on several devices that each hold the model.

    Args:
      config: the architecture.
      params: its params tree, on the host.
      blocks: as for `extract`.
      norm: likewise.
      of: what to return of each group's features, arrays that are all split by
        `batch_axis`; runs on the device, so that what it leaves out is never copied.
      batch_axis: the axis of the images in what `of` returns: 1 for the features as
        they are, [n, B, ...]; 0 for `class_token`.
      group: images that a device takes at once. Their number decides the order of sums
        and thus the last bits.
      devices: None means all, in the order of `placement.over`.
      precision: as for `extract`.
      run: likewise.

    Returns:
      A function from images [B, height, width, 3], NumPy or JAX, to what `of` returns,
      for any B: zeros fill up the last group, and are cut off.
    """
    sharding = placement.over(devices)
    mesh, axis = placement.axis_of(sharding)
    placed = placement.replicate(params, devices)

    def of_group(params: Any, images: Images) -> Any:
        return of(
            extract(
                config,
                params,
                images,
                blocks=blocks,
                norm=norm,
                precision=precision,
                run=run,
            )
        )

    def of_device(params: Any, images: Images) -> Any:
        groups = images.reshape(-1, group, *images.shape[1:])
        found = lax.map(lambda each: of_group(params, each), groups)
        return jax.tree.map(lambda x: _joined(x, batch_axis), found)

    everywhere, share = PartitionSpec(), PartitionSpec(axis)
    result = PartitionSpec(*[None] * batch_axis, axis)
    compiled = jax.jit(
        jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(everywhere, share),
            out_specs=result,
            check_vma=False,
        )
    )

    def features_of(images: Any) -> Any:
        count, step = len(images), mesh.shape[axis] * group
        vit.patch_grid(config, *images.shape[1:3])
        if missing := -count % step:
            filling = np.zeros((missing, *images.shape[1:]), images.dtype)
            images = np.concatenate([np.asarray(images), filling])
        found = compiled(placed, jax.device_put(images, sharding))
        if not missing:
            return found
        return jax.tree.map(
            lambda x: lax.slice_in_dim(x, 0, count, axis=batch_axis), found
        )

    return features_of


def _joined(groups: Array, batch_axis: int) -> Array:
    """[groups, ..., group, ...] with the images of all groups on one axis."""
    joined = jnp.moveaxis(groups, 0, batch_axis)
    shape = joined.shape
    return joined.reshape(*shape[:batch_axis], -1, *shape[batch_axis + 2 :])
