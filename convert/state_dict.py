"""PyTorch state dicts <-> the params tree, strictly and exactly.

    state dict --TorchModel--> layout, ViTConfig, one leaf at a time --from_torch--> all
    config, params --to_torch--> state dict, names in the order of the PyTorch model

The tables are in `convert.layouts`. Every missing, surplus or misshapen name and every
number that is not finite is reported before, or instead of, a result.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert import infer, layouts
from convert.files.tensors import StateDict
from convert.layouts import table as tables
from convert.statements import Statement
from sinder_jax import param_tree, vit
from sinder_jax.model import Model

FLOATS = ("float16", "bfloat16", "float32", "float64")


class TorchModel:
    """A state dict recognized as a DINOv2, whose leaves are made one at a time.

    Args:
      state_dict: NumPy arrays by PyTorch name in one of `layouts.LAYOUTS`, possibly
        with the prefixes and chunked block names of training; those of a `StateDict`
        are read only when their leaf is asked for.
      num_heads, prefix, overrides: as for `from_torch`.
      stated: what the file says of the model, beside its tensors.

    Attributes:
      layout: a key of `layouts.LAYOUTS`.
      config: the architecture.
      statements: its fields, and who says each.
      specs: shape and number format of every tensor, by bare name.
      table: slots of the tensors that exist, by bare name.
      shapes: of the leaves, by flat name.
      state: all tensors, by full name.
      names: full name of every tensor of the backbone, by bare name.
      files, contents: those of a `StateDict`; empty for tensors in memory.
      left_out: names of entries that are not part of the backbone.
      formats: number formats of the tensors, by NumPy's names.
      fills_mask_token: True if there is no mask token, so that it becomes zeros.

    Raises:
      ValueError: as for `from_torch`, except that numbers that are not finite are
        reported only beside another error.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        num_heads: int | None = None,
        *,
        prefix: str | None = None,
        stated: Sequence[Statement] = (),
        **overrides: Any,
    ):
        self.state = StateDict.of(state_dict)
        self.files, self.contents = self.state.files, self.state.contents
        self.names, left_out = infer.backbone_keys(list(self.state), prefix)
        self.left_out = [*self.state.left_out, *left_out]
        self.specs = {key: self.state.specs[x] for key, x in self.names.items()}
        seen = {key: spec.shape for key, spec in self.specs.items()}
        self.layout = infer.layout_of(seen)
        self.statements = infer.statements_of(
            self.layout, seen, num_heads, overrides, self.contents, stated
        )
        self.config = infer.config_from(self.statements)
        table = layouts.table_of(self.layout, self.config)
        self.table = {
            key: slot
            for key, slot in table.items()
            if key in self.specs or slot.path != tables.OPTIONAL
        }
        paths = {slot.path for slot in self.table.values()}
        self.fills_mask_token = tables.OPTIONAL not in paths
        self.formats = sorted({spec.dtype for spec in self.specs.values()})
        self.shapes = param_tree.leaf_shapes(self.config)
        if misfits := self._misfits():
            raise ValueError(
                f"the tensors do not make a {infer.describe(self.config)} in "
                f"{layouts.LAYOUTS[self.layout].owner} layout: "
                f"{infer.listing_by_kind(misfits | self._not_finite())}"
            )
        infer.check_heads(self.statements)

    def leaf(self, path: str) -> np.ndarray:
        """One leaf of the params, float32, in its own memory.

        Raises:
          ValueError: it holds NaN or infinity; names all tensors that do.
        """
        leaf = tables.from_tensors(path, self.shapes[path], self.table, self.tensor)
        if not param_tree.is_finite(leaf):
            raise ValueError(infer.listing_by_kind(self._not_finite()))
        return leaf

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors of the backbone by bare name, in their stored number formats."""
        return {key: self.tensor(key) for key in self.specs}

    def tensor(self, key: str) -> np.ndarray:
        """One tensor of the backbone by bare name, in its stored number format."""
        return self.state[self.names[key]]

    def _misfits(self) -> dict[str, list[str]]:
        """All that is wrong with names, shapes and formats, by kind."""
        specs, table = self.specs, self.table
        kinds = {
            "missing": [key for key in table if key not in specs],
            "surplus": [self.names[key] for key in specs if key not in table],
            "misshapen": [
                f"{self.names[key]} is {specs[key].shape}, not {slot.shape}"
                for key, slot in table.items()
                if key in specs and specs[key].shape != slot.shape
            ],
            f"not a NumPy array of {', '.join(FLOATS)}": [
                f"{self.names[key]} ({spec.dtype})"
                for key, spec in specs.items()
                if spec.dtype not in FLOATS
            ],
        }
        return {kind: names for kind, names in kinds.items() if names}

    def _not_finite(self) -> dict[str, list[str]]:
        names = [
            self.names[key]
            for key, spec in self.specs.items()
            if key in self.table
            and spec.shape == self.table[key].shape
            and spec.dtype in FLOATS
            and not _is_finite(self.tensor(key))
        ]
        return {"with NaN or infinity (as float32)": names} if names else {}


def from_torch(
    state_dict: Mapping[str, Any],
    num_heads: int | None = None,
    *,
    prefix: str | None = None,
    **overrides: Any,
) -> tuple[vit.ViTConfig, dict[str, Any]]:
    """Architecture and params of a PyTorch state dict in any layout.

    Args:
      state_dict: NumPy arrays by PyTorch name, in the layout of the DINOv2 hub files
        (also as training stores them: `teacher.backbone.`, chunked blocks), of Hugging
        Face transformers or of timm; float16, bfloat16 and float64 become float32. A
        missing mask token becomes zeros: only pre-training reads it.
      num_heads: None: that of the DINOv2 model of this width; heads of 64 in a model
        narrower than all of them; any other width needs it.
      prefix: of the backbone's names in a larger model, such as "pretrained."; None
        finds the backbone by its tensors.
      **overrides: fields of `vit.ViTConfig` that the tensors do not determine:
        `norm_epsilon` and `statistics`, DINOv2's if not given; and
        `interpolate_antialias` and `interpolate_offset`. Their default is the hub's,
        whatever the layout: False and 0.1, with registers True and 0.0. transformers
        resamples a model without registers by False and 0.0.

    Returns:
      The config, and params as float32 NumPy arrays that share no memory with the
      input.

    Raises:
      ValueError: not a DINOv2 model; a number of heads that nothing tells; an override
        that is unknown or contradicts the tensors; or tensors that do not fit: one
        message names every missing, surplus and misshapen tensor and every tensor that
        is not finite.
    """
    model = TorchModel(state_dict, num_heads, prefix=prefix, **overrides)
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
        and with registers its class token includes the position embedding; in the
        others registers include theirs.

    Returns:
      Contiguous float32 arrays by PyTorch name, in the order of the PyTorch model; they
      share no memory with `params`.

    Raises:
      ValueError: an unknown layout, or params that do not fit the config.
    """
    layouts.check_name(layout, config)
    param_tree.check(config, params)
    model = layouts.fitted(Model.of(config, params), layout)
    table = layouts.table_of(layout, model.config)
    tensors = dict(tables.to_tensors(table, model.leaf))
    return {key: tensors[key] for key in table}


def _is_finite(array: np.ndarray) -> bool:
    with np.errstate(all="ignore"):  # a float64 beyond float32 becomes infinite
        return param_tree.is_finite(array.astype(np.float32, copy=False))
