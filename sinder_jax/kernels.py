"""The kernels of a block: their names, their place in the params tree, their axes.

    name --place--> leaf of the params and columns of it --view--> kernel [in, out]
    params --split--> rest, trainable kernels by name --join--> params

A kernel is Flax's [in, out], stacked over blocks to [L, in, out]; the paper's W
multiplies a column and is its transpose (`matrix`). A repair trains the value third of
the fused query-key-value kernel, the attention projection and the two FFN kernels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sinder_jax import param_tree
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

FUSED = "attn/qkv"
THIRDS = ("attn/q", "attn/k", "attn/v")  # DINOv2 fuses q, k, v in this order


class Place(NamedTuple):
    """Where a kernel lives.

    Attributes:
      layer: path of its linear layer below `blocks`.
      third: which third of the layer's outputs it is; None for all of them.
    """

    layer: str
    third: int | None = None

    @property
    def path(self) -> str:
        """Flat name of the leaf of the params that holds the kernel."""
        return f"blocks/{self.layer}/kernel"

    def columns(self, size: int) -> slice:
        """The kernel's columns in a layer with `size` outputs."""
        if self.third is None:
            return slice(0, size)
        return slice(self.third * size // 3, (self.third + 1) * size // 3)

    def of(self, leaf: Any) -> Any:
        """The kernel's part of its leaf, or of its layer's bias; a view in NumPy.

        Args:
          leaf: [..., out], of one block or stacked over blocks.
        """
        return leaf[..., self.columns(leaf.shape[-1])]


_LAYERS = (FUSED, "attn/proj", "mlp/w12", "mlp/w3", "mlp/fc1", "mlp/fc2")
PLACES = {layer: Place(layer) for layer in _LAYERS} | {
    name: Place(FUSED, third) for third, name in enumerate(THIRDS)
}
"""The place of every kernel that a DINOv2 can have, by name."""


def names(config: ViTConfig) -> tuple[str, str, str, str]:
    """Names of the trainable kernels of a block, in the order data flows through them.

    Example:
      >>> from sinder_jax import vit
      >>> names(vit.CONFIGS["dinov2_vitg14"])
      ('attn/v', 'attn/proj', 'mlp/w12', 'mlp/w3')
    """
    first, last = ("w12", "w3") if config.ffn_layer == "swiglu" else ("fc1", "fc2")
    return "attn/v", "attn/proj", f"mlp/{first}", f"mlp/{last}"


def layers(config: ViTConfig) -> tuple[str, str, str, str]:
    """Names of the linear layers of a block; q, k and v are fused, as in the model.

    Example:
      >>> from sinder_jax import vit
      >>> layers(vit.CONFIGS["dinov2_vitg14"])
      ('attn/qkv', 'attn/proj', 'mlp/w12', 'mlp/w3')
    """
    return (FUSED, *names(config)[1:])


def in_block(name: str, block: int) -> str:
    """A kernel, or a leaf, of one block, as messages name it."""
    return f"{name} of block {block}"


def place(config: ViTConfig, name: str) -> Place:
    """Where a kernel lives in the params.

    Args:
      config: the architecture.
      name: one of `layers`, or "attn/q", "attn/k", "attn/v" for a third of the qkv.

    Raises:
      ValueError: the model has no such kernel.
    """
    allowed = (*layers(config), *THIRDS)
    if name not in allowed:
        raise ValueError(
            f"there is no kernel {name!r}: the blocks have {', '.join(allowed)}"
        )
    return PLACES[name]


def view(config: ViTConfig, params: Params, block: int, name: str) -> Any:
    """One kernel of one block, [in, out]; a view where the leaf is a NumPy array.

    Args:
      config: the architecture.
      params: the params tree, nested or flat.
      block: from 0.
      name: as for `place`.

    Raises:
      ValueError: the model has no such kernel.
    """
    found = place(config, name)
    return found.of(param_tree.leaf(params, found.path)[block])


def matrix(
    config: ViTConfig, params: Params, block: int, name: str
) -> Float[np.ndarray, "out in"]:
    """The kernel as the paper's W, which multiplies a column; float64.

    Arguments and errors as for `view`.
    """
    return np.asarray(view(config, params, block, name), np.float64).T


class BlockWeights(NamedTuple):
    """What the linear map of one block is made of, in the paper's terms; float64.

    Attributes:
      block: its index, from 0.
      ffn_layer: kind of the FFN, as in the config.
      v, proj, first, last: the trainable kernels in the order of `names`, as matrices
        that multiply a column.
      bias: of the FFN's first layer.
      scale1, scale2: of the LayerNorms before attention and FFN.
      gamma1, gamma2: of the LayerScales after them.
    """

    block: int
    ffn_layer: str
    v: Float[np.ndarray, "D D"]
    proj: Float[np.ndarray, "D D"]
    first: Float[np.ndarray, "up D"]
    last: Float[np.ndarray, "D F"]
    bias: Float[np.ndarray, " up"]
    scale1: Float[np.ndarray, " D"]
    gamma1: Float[np.ndarray, " D"]
    scale2: Float[np.ndarray, " D"]
    gamma2: Float[np.ndarray, " D"]


def weights(config: ViTConfig, params: Params, block: int) -> BlockWeights:
    """Reads what the linear map of a block is made of; arguments as for `view`."""
    matrices = (matrix(config, params, block, name) for name in names(config))
    bias = f"{names(config)[2]}/bias"
    vectors = (
        np.asarray(param_tree.leaf(params, f"blocks/{path}")[block], np.float64)
        for path in (bias, "norm1/scale", "ls1/gamma", "norm2/scale", "ls2/gamma")
    )
    return BlockWeights(block, config.ffn_layer, *matrices, *vectors)


def nest(**by_leaf: Mapping[str, Any]) -> dict[str, Any]:
    """The tree below `blocks` whose layers hold the given leaves.

    Args:
      **by_leaf: for each leaf, its values by kernel name.

    Example:
      >>> nest(u={"attn/v": 1}, s={"attn/v": 2})
      {'attn': {'v': {'u': 1, 's': 2}}}
    """
    return param_tree.unflatten(
        {
            f"{name}/{leaf}": value
            for leaf, by_name in by_leaf.items()
            for name, value in by_name.items()
        }
    )


# --- Between a params tree and its trainable kernels --------------------------------


def split(config: ViTConfig, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits `params` into the trainable kernels and the rest.

    Returns:
      (rest, kernels). `rest` is a tree like `params` without the trainable kernels; its
      blocks/attn holds `qk` {kernel [L, D, 2D], bias [L, 2D]} and `v` {bias [L, D]} in
      place of `qkv`. `kernels` maps each of `names` to an array [L, in, out].
    """
    flat = param_tree.flatten(params)
    for leaf in ("kernel", "bias"):
        fused = flat.pop(f"blocks/{FUSED}/{leaf}")
        value = PLACES["attn/v"].columns(fused.shape[-1])
        flat[f"blocks/attn/qk/{leaf}"] = fused[..., : value.start]
        flat[f"blocks/attn/v/{leaf}"] = fused[..., value]
    kernels = {name: flat.pop(f"blocks/{name}/kernel") for name in names(config)}
    return param_tree.unflatten(flat), kernels


def join(rest: Params, kernels: Mapping[str, Any]) -> dict[str, Any]:
    """Puts back what `split` took apart, bit for bit; a tree of host arrays."""
    flat = param_tree.flatten(rest)
    flat |= {f"blocks/{name}/kernel": kernel for name, kernel in kernels.items()}
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    for leaf in ("kernel", "bias"):
        parts = [flat.pop(f"blocks/attn/{part}/{leaf}") for part in ("qk", "v")]
        flat[f"blocks/{FUSED}/{leaf}"] = np.concatenate(parts, axis=-1)
    return param_tree.unflatten(flat)
