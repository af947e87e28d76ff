"""State dicts of PyTorch <-> the params tree, strictly and exactly.

    state dict --TorchModel--> layout, ViTConfig, one leaf at a time --from_torch--> all
    config, params --to_torch--> state dict, names in the order of the PyTorch model

The tables are in `convert.layouts`. Every name that is missing, surplus or misshapen,
and every number that is not finite, is told before or instead of a result.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert import infer, layouts
from convert.state_dict import Spec
from sinder_jax import param_tree, vit

FLOATS = ("float16", "bfloat16", "float32", "float64")


class TorchModel:
    """A PyTorch state dict understood as a DINOv2; its leaves are made one by one.

    Args:
      state_dict: NumPy arrays by PyTorch name in any of `layouts.LAYOUTS`, also
        with the prefixes and chunked block names of training; those of a
        `StateDict` are read only as their leaf is asked for.
      num_heads, overrides: as for `from_torch`.

    Attributes:
      layout: a key of `layouts.LAYOUTS`.
      config: the architecture.
      table: the slots of the tensors that are there, by bare name.
      shapes: of the leaves, by flat name.
      left_out: names of tensors that are no part of the backbone.
      formats: the number formats of the tensors, by NumPy's names.
      fills_mask_token: whether there is none, so that it becomes zeros.

    Raises:
      ValueError: as for `from_torch`; numbers that are not finite only where something
        else is wrong, too.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        num_heads: int | None = None,
        **overrides: Any,
    ):
        self._state_dict = state_dict
        specs = specs_of(state_dict)
        backbone = infer.backbone_keys(list(specs))
        self._keys, self.left_out = backbone.keys, backbone.left_out
        self.specs = {key: specs[name] for key, name in self._keys.items()}
        seen = {key: spec.shape for key, spec in self.specs.items()}
        self.layout = infer.layout_of(seen)
        self.config = infer.config_of(self.layout, seen, num_heads, overrides)
        table = layouts.table(self.layout, self.config)
        self.fills_mask_token = not any(
            slot.path == layouts.OPTIONAL and key in self.specs
            for key, slot in table.items()
        )
        self.table = {
            key: slot
            for key, slot in table.items()
            if key in self.specs or slot.path != layouts.OPTIONAL
        }
        self.formats = sorted({self.specs[key].dtype for key in self.specs})
        self.shapes = {
            path: tuple(leaf.shape)
            for path, leaf in param_tree.flatten(param_tree.shapes(self.config)).items()
        }
        misfits = self._misfits()
        if misfits:
            misfits |= self._not_finite()
            raise ValueError(
                f"the tensors do not make a {infer.describe(self.config)} in "
                f"{layouts.DESCRIPTIONS[self.layout]} layout: {_told(misfits)}."
            )

    def leaf(self, path: str) -> np.ndarray:
        """One leaf of the params, float32, in memory of its own.

        Raises:
          ValueError: it holds NaN or infinity; names all tensors that do.
        """
        leaf = layouts.from_tensors(path, self.shapes[path], self.table, self._tensor)
        if not param_tree.is_finite(leaf):
            raise ValueError(f"{_told(self._not_finite())}.")
        return leaf

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors of the backbone by bare name, as they are stored."""
        return {key: self._tensor(key) for key in self.specs}

    def _tensor(self, key: str) -> np.ndarray:
        return self._state_dict[self._keys[key]]

    def _misfits(self) -> dict[str, list[str]]:
        """All that is wrong with names, shapes and formats, by kind."""
        specs, table = self.specs, self.table
        kinds = {
            "missing": [key for key in table if key not in specs],
            "surplus": [self._keys[key] for key in specs if key not in table],
            "misshapen": [
                f"{self._keys[key]} is {specs[key].shape}, not {slot.shape}"
                for key, slot in table.items()
                if key in specs and specs[key].shape != slot.shape
            ],
            f"no NumPy array of {', '.join(FLOATS)}": [
                f"{self._keys[key]} ({spec.dtype})"
                for key, spec in specs.items()
                if spec.dtype not in FLOATS
            ],
        }
        return {kind: names for kind, names in kinds.items() if names}

    def _not_finite(self) -> dict[str, list[str]]:
        names = [
            self._keys[key]
            for key, spec in self.specs.items()
            if key in self.table
            and spec.shape == self.table[key].shape
            and spec.dtype in FLOATS
            and not _is_finite(self._tensor(key))
        ]
        return {"with NaN or infinity (as float32)": names} if names else {}


def from_torch(
    state_dict: Mapping[str, Any], num_heads: int | None = None, **overrides: Any
) -> tuple[vit.ViTConfig, dict[str, Any]]:
    """Architecture and params of a PyTorch state dict, whichever its layout.

    Args:
      state_dict: NumPy arrays by PyTorch name, in the layout of the DINOv2 hub files
        (also as training stores them: `teacher.backbone.`, chunked blocks), of Hugging
        Face transformers or of timm; float16, bfloat16 and float64 become float32. A
        mask token that is missing becomes zeros: only pre-training reads it.
      num_heads: None: embed_dim // 64, as in all DINOv2 models.
      overrides: fields of `vit.ViTConfig` that tensors cannot tell:
        `interpolate_antialias` and `interpolate_offset`. Without them the hub's,
        whichever the layout: False and 0.1, with registers True and 0.0. transformers
        resamples a model without registers by False and 0.0.

    Returns:
      The config, and params as float32 NumPy arrays that share no memory with the
      input.

    Raises:
      ValueError: no DINOv2, an override that is unknown or contradicts the tensors, or
        tensors that do not fit: every missing, surplus and misshapen name, and every
        tensor that is not finite, in one message.
    """
    model = TorchModel(state_dict, num_heads, **overrides)
    return model.config, param_tree.unflatten(
        {path: model.leaf(path) for path in model.shapes}
    )


def to_torch(
    config: vit.ViTConfig, params: Mapping[str, Any], layout: str = "dinov2"
) -> dict[str, np.ndarray]:
    """PyTorch state dict of a model: the inverse of `from_torch`.

    Args:
      config: the architecture.
      params: float32 arrays, of NumPy or JAX, in the layout of `param_tree.shapes`.
      layout: "dinov2" (hub), "hf" (transformers) or "timm". timm's has no mask token,
        and with registers its class token includes the position embedding.

    Returns:
      Contiguous float32 arrays by PyTorch name, in the order of the PyTorch model; they
      share no memory with `params`.

    Raises:
      ValueError: an unknown layout, or params that do not fit the config.
    """
    layouts.check_name(layout)
    param_tree.check(config, params)
    flat = param_tree.flatten(params)
    table = layouts.table(layout, config)
    tensors = dict(layouts.to_tensors(table, lambda path: np.asarray(flat[path])))
    return {key: tensors[key] for key in table}


def specs_of(state_dict: Mapping[str, Any]) -> dict[str, Spec]:
    """Shape and number format of every tensor, without reading those in a file."""
    known = getattr(state_dict, "specs", None)
    if known is not None:
        return dict(known)
    return {
        key: Spec(
            tuple(getattr(value, "shape", ())),
            value.dtype.name if isinstance(value, np.ndarray) else type(value).__name__,
        )
        for key, value in state_dict.items()
    }


def _told(misfits: Mapping[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} {kind}: {infer.listing(names)}"
        for kind, names in misfits.items()
    )


def _is_finite(array: np.ndarray) -> bool:
    with np.errstate(all="ignore"):  # a float64 beyond float32 becomes infinite
        return param_tree.is_finite(array.astype(np.float32, copy=False))
