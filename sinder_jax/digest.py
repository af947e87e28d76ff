"""SHA-256 of arrays and of whole models, the latter the same in every layout.

    array --of_array--> digest of its bytes
    leaves one by one --ModelDigest--> digest of all that decides a model's features

A model's digest names its weights, not a file: hub file, Hugging Face directory, timm
file and checkpoint of the same weights share it. So it leaves out the mask token, which
only pre-training reads, and takes the class token together with its position embedding,
as timm stores them where a model has registers.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

CLASS_TOKEN, POSITIONS, MASK_TOKEN = "cls_token", "pos_embed", "mask_token"


def of_array(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order, as 64 hexadecimal digits."""
    # A view of bytes: hashlib knows no bfloat16.
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


class ModelDigest:
    """Digest of a model whose leaves come one after the other, in any order."""

    def __init__(self):
        self._lines: dict[str, str] = {}
        self._together: dict[str, np.ndarray] = {}

    def add(self, path: str, array: np.ndarray, digest: str | None = None) -> None:
        """Takes in one leaf of the params.

        Args:
          path: its flat name, such as "blocks/attn/proj/kernel".
          array: float32, in the layout of `vit.param_shapes`.
          digest: `of_array(array)`, where it is known already.
        """
        if path in (CLASS_TOKEN, POSITIONS):
            self._together[path] = np.array(array)
        elif path != MASK_TOKEN:
            self._lines[path] = f"{list(array.shape)} {digest or of_array(array)}"

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
                lines[name] = f"{list(part.shape)} {of_array(part)}"
        text = "".join(f"{name} {lines[name]}\n" for name in sorted(lines))
        return hashlib.sha256(text.encode()).hexdigest()


def of_model(flat: Mapping[str, Any]) -> str:
    """Digest of a whole model.

    Args:
      flat: float32 arrays by flat name (`checkpoint.flatten(params)`).
    """
    found = ModelDigest()
    for path, leaf in flat.items():
        found.add(path, np.asarray(leaf))
    return found.hexdigest()
