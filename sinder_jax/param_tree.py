"""The params tree of a model: flat names, shapes, checks, digest of the weights.

    {"blocks": {"norm1": {...}}} --flatten--> {"blocks/norm1/scale": ...} --unflatten-->
    config --shapes--> the tree that a model must have --check--> an error naming leaves
    leaves, one by one --ModelDigest--> SHA-256 of everything that decides its features

A digest identifies the weights of a model, not a file: hub file, Hugging Face
directory, timm file and checkpoint of the same weights share one digest. So it leaves
out the mask token, which only pre-training reads, and adds the class token to its
position embedding, because timm stores the sum for models with registers.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sinder_jax.vit import ViT, ViTConfig

Params = Mapping[str, Any]
"""A tree of arrays, nested or flat, under the names of DINOv2."""

CLASS_TOKEN, POSITIONS, MASK_TOKEN = "cls_token", "pos_embed", "mask_token"


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": x}}` as `{"a/b": x}`."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` as `{"a": {"b": x}}`: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def leaf(params: Params, path: str) -> Any:
    """The leaf of a flat name, from a nested tree or a flat one."""
    if path in params:
        return params[path]
    node: Any = params
    for name in path.split("/"):
        node = node[name]
    return node


# --- Shapes and checks ----------------------------------------------------------------


@functools.lru_cache
def _shapes(config: ViTConfig) -> Any:
    image = jnp.zeros((1, config.patch_size, config.patch_size, 3))
    return jax.eval_shape(ViT(config).init, jax.random.key(0), image)["params"]


def shapes(config: ViTConfig) -> dict[str, Any]:
    """The params tree with a `jax.ShapeDtypeStruct` in place of each array."""
    return jax.tree.map(lambda leaf: leaf, _shapes(config))


def leaf_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves by flat name, in a fixed order."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(shapes(config)).items()}


def num_params(config: ViTConfig) -> int:
    """Number of parameters, counted from the shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))


def check_shapes(config: ViTConfig, params: Mapping[str, Any]) -> None:
    """Raises ValueError naming every leaf that is missing, surplus or misshapen."""
    got = {path: tuple(np.shape(leaf)) for path, leaf in flatten(params).items()}
    check_leaf_shapes(config, got)


def check_leaf_shapes(config: ViTConfig, got: Mapping[str, tuple[int, ...]]) -> None:
    """As `check_shapes`, for the shapes of the leaves by flat name."""
    want = leaf_shapes(config)
    wrong = [f"{path} is missing" for path in want.keys() - got.keys()]
    wrong += [f"{path} is surplus" for path in got.keys() - want.keys()]
    wrong += [
        f"{path} has shape {got[path]}, not {want[path]}"
        for path in want.keys() & got.keys()
        if want[path] != got[path]
    ]
    if wrong:
        listed = "; ".join(sorted(wrong))
        raise ValueError(f"params do not fit {config}: {listed}")


def check_finite(params: Mapping[str, Any]) -> None:
    """Raises ValueError naming every array that holds NaN or infinity."""
    bad = [p for p, leaf in flatten(params).items() if not is_finite(np.asarray(leaf))]
    if bad:
        raise ValueError(f"params hold values that are not finite: {'; '.join(bad)}")


def check(config: ViTConfig, params: Mapping[str, Any]) -> None:
    """Refuses params that are not the finite float32 arrays of this architecture.

    Raises:
      ValueError: names every missing, surplus and misshapen path or, where the shapes
        fit, every array that is not float32 or holds NaN or infinity.
    """
    check_shapes(config, params)
    wrong = [why for path, x in flatten(params).items() if (why := misfit(path, x))]
    if wrong:
        raise ValueError(f"params are not finite float32 numbers: {'; '.join(wrong)}")


def misfit(path: str, array: Any) -> str:
    """Says why an array cannot be a leaf; empty if it is finite float32."""
    if array.dtype != np.float32:
        return f"{path} is {array.dtype}, not float32"
    return "" if is_finite(np.asarray(array)) else f"{path} holds NaN or infinity"


def is_finite(array: np.ndarray) -> bool:
    """True without NaN or infinity; reads slice by slice to save memory."""
    with np.errstate(all="ignore"):
        if np.isfinite(np.sum(array)):  # NaN and infinity would show: one fast pass
            return True
    slices = array if array.ndim > 1 else array[None]
    return all(bool(np.isfinite(part).all()) for part in slices)


# --- Digests --------------------------------------------------------------------------


def digest_of_array(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order, as 64 hexadecimal digits."""
    # A view of bytes, because hashlib does not know bfloat16.
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


class ModelDigest:
    """Digest of a model from its leaves, one by one and in any order."""

    def __init__(self):
        self._lines: dict[str, str] = {}
        self._together: dict[str, np.ndarray] = {}

    def add(self, path: str, array: np.ndarray, sha256: str = "") -> None:
        """Adds one leaf of the params.

        Args:
          path: its flat name, such as "blocks/attn/proj/kernel".
          array: float32, of the shape in `shapes(config)`.
          sha256: `digest_of_array(array)`; empty to compute it here.
        """
        if path in (CLASS_TOKEN, POSITIONS):
            self._together[path] = np.array(array)
        elif path != MASK_TOKEN:
            sha256 = sha256 or digest_of_array(array)
            self._lines[path] = f"{list(array.shape)} {sha256}"

    def hexdigest(self) -> str:
        """The digest of all leaves added, as 64 hexadecimal digits."""
        lines = dict(self._lines)
        if self._together.keys() == {CLASS_TOKEN, POSITIONS}:
            positions = self._together[POSITIONS]
            parts = {
                "class token with position": self._together[CLASS_TOKEN]
                + positions[:, :1],
                "patch positions": positions[:, 1:],
            }
            for name, part in parts.items():
                lines[name] = f"{list(part.shape)} {digest_of_array(part)}"
        text = "".join(f"{name} {lines[name]}\n" for name in sorted(lines))
        return hashlib.sha256(text.encode()).hexdigest()


def digest(params: Mapping[str, Any]) -> str:
    """Digest of a whole model: a params tree of float32 arrays, flat or nested."""
    found = ModelDigest()
    for path, leaf in flatten(params).items():
        found.add(path, np.asarray(leaf))
    return found.hexdigest()
