"""What the numbers of an analysis depend on besides models and photographs.

a repair's config, `--gamma`, `--blocks` --Options.of--> Options
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from sinder_jax import defects, loss


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an analysis; those of a repair keep their names.

    Attributes:
      mask_thr, window, min_outliers: of the detection, see `repair.RepairOptions`.
      image_size: short side of a photograph in pixels.
      method, num_probes, seed: of the directions, see `defects.singular_defects`; the
        seed also draws the random directions.
      gammas: thresholds of the clamped models.
      blocks: shown one by one; None: four, evenly spaced, including the last (9,
        19, 29 and 39 of a giant).

    Raises:
      ValueError: an option out of range.
    """

    mask_thr: float
    window: int
    min_outliers: int
    image_size: int
    method: str
    num_probes: int
    seed: int
    gammas: tuple[float, ...]
    blocks: tuple[int, ...] | None = None

    def __post_init__(self):
        loss.check_loss_options(
            mask_thr=self.mask_thr, window=self.window, temperature=1.0
        )
        if self.method not in defects.METHODS:
            raise ValueError(
                f"method must be one of {defects.METHODS}, got {self.method!r}"
            )
        for gamma in self.gammas:
            if not 0 < gamma < float("inf"):
                raise ValueError(f"--gamma must be above 0, got {gamma:g}")

    @classmethod
    def of(cls, config: ConfigDict, **given: Any) -> "Options":
        """The options of a repair's config; `given` adds the others."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in names if name in config}, **given)

    def chosen_blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks shown one by one of a model with `depth` blocks.

        Raises:
          ValueError: a block that does not exist.
        """
        if self.blocks is None:
            return tuple(sorted({max(k * depth // 4 - 1, 0) for k in (1, 2, 3, 4)}))
        for block in self.blocks:
            if not 0 <= block < depth:
                raise ValueError(
                    f"there is no block {block}: the model has blocks 0 to {depth - 1}"
                )
        return self.blocks
