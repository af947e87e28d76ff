"""What a repair leaves: pictures on the way, the repaired model, numbers of a summary.

params now --Observer--> pictures before / now, measures of photographs
params now --export--> repaired/, repaired.safetensors, repaired.pth
ε --export_delta--> repaired.patch.safetensors
"""

import importlib.util
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from convert import layouts, saving
from experiments.run import sinks
from experiments.run.inputs import is_readable
from experiments.run.workdir import Workdir
from sinder_jax import checkpoint, delta, families, param_tree, vit
from sinder_jax.analysis import defective
from sinder_jax.analysis.tokens import last_patches
from sinder_jax.data import decode
from sinder_jax.data.listing import Photograph
from sinder_jax.model import Model
from sinder_jax.storage import array_store, delta_file, files
from sinder_jax.storage.original import Original


def export(workdir: Workdir, original: Model, params: Any) -> list[str]:
    """Writes the repaired model for JAX and PyTorch; returns the names of the files.

    `repaired/` is a checkpoint; `repaired.safetensors` and, where torch is installed,
    `repaired.pth` have the hub's names. All say where the repaired weights come from.

    Args:
      workdir: where they are written.
      original: the model before the repair.
      params: the repaired params.
    """
    repaired = Model.of(original.config, params, original.provenance)
    repaired = repaired.with_step(f"repaired by {array_store.tool()}")
    target = workdir.path / "repaired"
    if not target.exists():  # else a finish was cut short: the same model
        checkpoint.save(target, repaired.config, params, repaired.provenance)
    names = ["repaired.safetensors"]
    if importlib.util.find_spec("torch"):
        names.append("repaired.pth")
    table = layouts.table_of("dinov2", repaired.config)
    for name in names:
        with workdir.output(name) as path:
            saving.save(path, repaired, table, overwrite=True)
    return ["repaired", *names]


def export_delta(
    workdir: Workdir, original: Original, eps: Mapping[str, Any]
) -> list[str]:
    """Writes what the repair changed, `repaired.patch.safetensors`; names the file.

    Writes nothing if the repair changed nothing.

    Args:
      workdir: where it is written.
      original: model and factors before the repair.
      eps: ε by kernel name, [L, S].
    """
    if not any(np.any(e) for e in eps.values()):
        return []
    model = original.model
    made = delta.from_eps(model.config, model.params, original.factors, eps)
    with workdir.output("repaired.patch.safetensors") as path:
        path.unlink(missing_ok=True)  # left by a finish that was cut short
        delta_file.save(path, made, {"provenance": json.dumps(dict(model.provenance))})
    return [path.name]


class Look(NamedTuple):
    """One photograph as a model sees it.

    Attributes:
      pixels: the training crop.
      tokens: last block's patch tokens.
    """

    pixels: UInt8[np.ndarray, "size size 3"]
    tokens: Float[Array, "H W D"]


class Observer:
    """Compares the model as it is now with the original, on photographs.

    Args:
      config: the architecture.
      params: the original params.
      direction: singular defect direction of the original's last block.
      mask_thr: see `loss.outlier_mask`.
      size: side of the training crop in pixels.
    """

    def __init__(
        self,
        config: vit.ViTConfig,
        params: Any,
        direction: Float[Array, " D"],
        *,
        mask_thr: float,
        size: int,
    ):
        self._config, self._original = config, params
        self._direction, self._mask_thr, self._size = direction, mask_thr, size

    def picture(self, photographs: Sequence[Photograph], params: Any) -> sinks.RGB:
        """Draws the photographs' tokens before and now, see `pictures.token_rows`."""
        from sinder_jax.plots import pictures, style  # matplotlib: not for --help

        looks = []
        for photograph in photographs:
            models = {"before": self._original, "now": params}
            seen = {name: self._look(photograph, each) for name, each in models.items()}
            maps = {
                name: defective.token_maps(
                    look.tokens, self._direction, mask_thr=self._mask_thr
                )
                for name, look in seen.items()
            }
            looks.append((seen["now"].pixels, maps))
        return style.pixels(pictures.token_rows(looks))

    def measure(
        self, photographs: Sequence[Photograph], params: Any, most: int
    ) -> dict[str, Any] | None:
        """Defects before and after, as means over photographs and one by one.

        Args:
          photographs: those that can be chosen from.
          params: the repaired params.
          most: how many of them are measured, see `spread`.

        Returns:
          Per-photograph means, the largest norm ratios, and all numbers by name; None
          if there is no readable photograph.
        """
        each = {}
        for one in spread(photographs, most):
            before, now = self._look(one, self._original), self._look(one, params)
            each[one.name] = defective.measure(
                before.tokens, now.tokens, self._direction, mask_thr=self._mask_thr
            )
        if not each:
            return None

        def mean(name: str) -> float:
            return float(np.mean([numbers[name] for numbers in each.values()]))

        def largest(name: str) -> float:
            return max(numbers[name] for numbers in each.values())

        return {
            "photographs": len(each),
            "defective_patches_by_direction": {
                "before": mean("outliers_before"),
                "after": mean("outliers_after"),
            },
            "defective_patches_by_norm": {
                "before": mean("large_norms_before"),
                "after": mean("large_norms_after"),
            },
            "largest_to_median_norm": {
                "before": largest("norm_ratio_before"),
                "after": largest("norm_ratio_after"),
            },
            "cosine_of_sound_tokens": mean("cosine_of_sound_tokens"),
            "each": each,
        }

    def _look(self, photograph: Photograph, params: Any) -> Look:
        config = self._config
        photo = photograph.read()
        crop = decode.training_crop(photo, self._size, patch_size=config.patch_size)
        image = decode.normalize(crop, families.of(config).statistics)
        return Look(np.asarray(crop), last_patches(config, params, image))


def save_png(path: Path, rgb: sinks.RGB) -> None:
    """Writes a picture as PNG, whole or not at all."""
    with files.replacing(path) as partial:
        Image.fromarray(rgb).save(partial, format="PNG")


def spread(photographs: Sequence[Photograph], most: int) -> list[Photograph]:
    """The first readable photograph of each of `most` equal parts of a list.

    No more are decoded than that takes: there may be a million.
    """
    count = len(photographs)
    parts = np.array_split(np.arange(count), min(most, count) or 1)
    readable = (filter(is_readable, (photographs[i] for i in part)) for part in parts)
    return [one for found in readable for one in itertools.islice(found, 1)]


def run_summary(workdir: Workdir) -> dict[str, Any]:
    """Counts of the images so far, from the run's metrics."""
    rows = workdir.read_metrics()
    bad = [row["file"] for row in rows if row["readable"] and not row["finite"]]
    return {
        "images": len(rows),
        "images_with_defect": sum(row["layer"] not in (None, -1) for row in rows),
        "images_not_finite": len(bad),
        "files_not_finite": sorted(set(bad)),
        "unreadable_files": sorted({r["file"] for r in rows if not r["readable"]}),
        "share_of_last_images_without_defect": rows[-1]["skipped"] if rows else 0.0,
    }


def change_summary(saved: dict[str, Any]) -> dict[str, Any]:
    """What the run changed, from its last state (`repair.to_saved`)."""
    eps = param_tree.flatten(saved["eps"])
    changed = np.any([np.any(e, axis=1) for e in eps.values()], axis=0)
    return {
        "changed_blocks": np.flatnonzero(changed).tolist(),
        "largest_change_of_a_singular_value": {
            name: float(np.abs(e).max()) for name, e in eps.items()
        },
    }


def describe(name: str, measures: dict[str, Any] | None) -> str:
    """The measures of a set of photographs in one line."""
    if measures is None:
        return f"{name}: no photographs"

    def change(key: str) -> str:
        return f"{measures[key]['before']:.2f} -> {measures[key]['after']:.2f}"

    return (
        f"{name}, {measures['photographs']} photographs: defective patches each "
        f"{change('defective_patches_by_direction')} by direction, "
        f"{change('defective_patches_by_norm')} by norm; largest to median norm "
        f"{change('largest_to_median_norm')}; cosine of sound tokens "
        f"{measures['cosine_of_sound_tokens']:.4f}"
    )
