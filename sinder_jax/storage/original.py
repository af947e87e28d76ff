"""What a repair starts from and never changes: computed once, stored in WORKDIR/frozen.

    Original: model, factors, directions --save--> DIR --load--> the same

Every start and every process of a run reads the stored factors, as does `convert diff`:
ε belongs to that basis, and another machine's SVD may turn it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sinder_jax import checkpoint, factor, param_tree
from sinder_jax.model import Model
from sinder_jax.storage import array_store
from sinder_jax.storage.paths import StrPath
from sinder_jax.vit import ViTConfig

PARTS = ("u", "sigma", "v")
BASIS = "frozen"  # under which a state's metadata holds `Original.digest`


class Original(NamedTuple):
    """The model to repair, with everything that was derived from it.

    Attributes:
      model: the original model, in memory; its config resamples as the run does.
      factors: SVD of its trainable kernels.
      directions: singular defect directions, [L, D], unit rows.
      digest: of all its arrays, the basis of ε among them; empty before it is stored.
    """

    model: Model
    factors: factor.Factors
    directions: Float[np.ndarray, "L D"]
    digest: str = ""


def save(path: StrPath, original: Original, gaps: Sequence[float] = ()) -> None:
    """Writes an original model as a checkpoint directory.

    Args:
      path: a directory that does not exist, in one that does.
      original: the model, factors and directions.
      gaps: σ₀/σ₁ of each block's product, recorded for the reader; [L].

    Raises:
      As `checkpoint.save_tree`.
    """
    model, factors, directions, _ = original
    tree = {
        "params": model.params,
        "factors": {
            part: param_tree.unflatten(getattr(factors, part)) for part in PARTS
        },
        "directions": directions,
    }
    header = {
        "config": model.config.as_dict(),
        "gaps": list(gaps),
        "provenance": dict(model.provenance),
        "digest": model.digest,
    }
    checkpoint.save_tree(path, tree, header)


def load(path: StrPath) -> Original:
    """Reads what `save` wrote, all of it into memory.

    Raises:
      As `checkpoint.load_tree`.
    """
    reader = array_store.Reader(path)
    tree, header = reader.read_all(), reader.metadata
    arrays = {name: entry["sha256"] for name, entry in reader.arrays.items()}
    digest = hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()
    model = Model.of(
        ViTConfig(**header["config"]), tree["params"], header.get("provenance")
    )
    model.known_digest = header["digest"]
    parts: dict[str, Any] = {
        part: param_tree.flatten(tree["factors"][part]) for part in PARTS
    }
    return Original(model, factor.Factors(**parts), tree["directions"], digest)


def check_basis(path: StrPath, original: Original, state: Mapping[str, Any]) -> None:
    """Refuses a state whose ε belongs to other factors.

    Args:
      path: where `original` is stored.
      original: model and factors.
      state: metadata of the state.

    Raises:
      ValueError: says what to do.
    """
    if state[BASIS] != original.digest:
        raise ValueError(
            f"{path} was made again, with other bits; the states belong to the "
            f"singular vectors of before: put {path} back from a copy, or choose "
            "another --workdir"
        )


def describe_model(path: StrPath) -> tuple[ViTConfig, str]:
    """Config and digest of the model that `save` wrote, without reading its arrays.

    Raises:
      As `checkpoint.load_tree`.
    """
    header = array_store.Reader(path).metadata
    return ViTConfig(**header["config"]), header["digest"]
