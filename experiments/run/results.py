"""The results of a repair: pictures on the way, the repaired model, the summary.

params now --Observer--> pictures before / now, measures of photographs
params now --export--> repaired/, repaired.safetensors, repaired.pth
ε --export_delta--> repaired.patch.safetensors
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from convert import layouts, saving
from convert.files import sha256
from experiments.run import sinks, truth
from experiments.run.inputs import is_readable, load_model, repair_options
from experiments.run.workdir import Workdir
from sinder_jax import checkpoint, cli, delta, families, param_tree, vit
from sinder_jax.analysis import defective
from sinder_jax.analysis.tokens import last_patches
from sinder_jax.checkpoint import Newest
from sinder_jax.data import decode
from sinder_jax.data.listing import Photograph
from sinder_jax.model import Model
from sinder_jax.storage import array_store, delta_file, files, paths, run_files
from sinder_jax.storage.original import Original

# Times and places that Orbax records and nobody reads: no two exports have the same.
UNREAD = (run_files.COMMITTED, "_CHECKPOINT_METADATA")


def write(
    workdir: Workdir,
    config: ConfigDict,
    original: Original,
    observer: "Observer",
    sets: Mapping[str, Sequence[Photograph]],
    saved: Mapping[str, Any],
    repaired: Any,
) -> dict[str, Any]:
    """Writes all files of a finished repair and prints its measures.

    Args:
      workdir: where the files are written.
      config: of the run.
      original: model and factors before the repair.
      observer: measures and draws.
      sets: photographs to measure on, by name.
      saved: the last state, from `repair.to_saved`.
      repaired: the repaired params.

    Returns:
      What summary.json says of changes, measures and files.
    """
    eps = param_tree.flatten(saved["eps"])
    files = export(workdir, original.model, repaired)
    files += export_delta(workdir, original, eps)
    watched = [photo for photos in sets.values() for photo in spread(photos, 1)]
    with workdir.output("before_after.png") as path:
        save_png(path, observer.picture(watched, repaired))
    measures = {
        name: observer.measure(photographs, repaired, config.measure_images)
        for name, photographs in sets.items()
    }
    for name, numbers in measures.items():
        print(describe(name.replace("_", " "), numbers))
    written = {}
    if config.plant:
        written = {
            "against_truth": _against_truth(
                workdir, config, original, sets, repaired, int(saved["num_images"])
            )
        }
    changed = np.any([np.any(e, axis=1) for e in eps.values()], axis=0)
    files.append("before_after.png")
    return {
        "changed_blocks": np.flatnonzero(changed).tolist(),
        "largest_change_of_a_singular_value": {
            name: float(np.abs(e).max()) for name, e in eps.items()
        },
        **measures,
        **written,
        "files": files,
        "sha256": digests(workdir, files),
    }


def _against_truth(
    workdir: Workdir,
    config: ConfigDict,
    original: Original,
    sets: Mapping[str, Sequence[Photograph]],
    repaired: Any,
    num_images: int,
) -> dict[str, Any]:
    """What `truth.compare` returns, on as many photographs as the other measures."""
    chosen = {name: spread(x, config.measure_images) for name, x in sets.items()}
    return truth.compare(
        workdir,
        config,
        repair_options(config),
        load_model(config),
        original,
        sets["repaired_on"],
        {name: photographs for name, photographs in chosen.items() if photographs},
        repaired,
        num_images,
    )


def digests(workdir: Workdir, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of a workdir and of their side files, by name.

    A folder's is that of the list of its files. Empty for a bucket, which keeps the
    digests of its objects itself.
    """
    if paths.is_remote(workdir.path):
        return {}
    found = {}
    for path in (Path(workdir.path, name) for name in names):
        for each in (path, sha256.side_file(path)):
            within = sorted(each.rglob("*") if each.is_dir() else [each])
            parts = [x for x in within if x.is_file() and x.name not in UNREAD]
            if each.exists():
                found[each.name] = sha256.of_files(parts)
    return found


def lost(workdir: Workdir) -> list[str] | None:
    """Names of a finished run's files that are missing or not as its summary says.

    Drops what is no line of an image from the metrics. Returns None if the run is not
    finished, or ended with its diagnosis, which may be overruled.
    """
    summary = workdir.read_summary()
    if summary.get("finished") is not True or not summary["files"]:
        return None
    workdir.rewind_metrics(summary["images"])
    return damaged(workdir, summary)


def damaged(workdir: Workdir, summary: Mapping[str, Any]) -> list[str]:
    """Names of files that are missing or not as the summary of a run says."""
    stated = summary.get("sha256", {})  # a bucket's, and an earlier version's, has none
    found = digests(workdir, summary["files"]) if stated else {}
    return [
        name
        for name in dict.fromkeys([*summary["files"], *stated])
        if not (workdir.path / name).exists() or found.get(name) != stated.get(name)
    ]


def check_can_be_made(
    workdir: Workdir, lost: Sequence[str], newest: Newest | None
) -> None:
    """Says which files of a finished run are made again, and from which state.

    Raises:
      ValueError: no state is left.
    """
    reason = f"{workdir.path} is finished, but missing or damaged: {', '.join(lost)}"
    if newest is None:
        raise ValueError(
            f"{reason}; no state is left to make them from: put them back from a copy, "
            f"or move {workdir.summary.name} away to run it again"
        )
    cli.warn(f"{reason}; made again from state {newest.path.name}")


def export(workdir: Workdir, original: Model, params: Any) -> list[str]:
    """Writes the repaired model for JAX and PyTorch; returns the file names.

    `repaired/` is a checkpoint; `repaired.safetensors` and, where torch is installed,
    `repaired.pth` use the hub's names. All carry the provenance of the weights.

    Args:
      workdir: where they are written.
      original: the model before the repair.
      params: the repaired params.
    """
    repaired = Model.of(original.config, params, original.provenance)
    repaired = repaired.with_step(f"repaired by {array_store.tool()}")
    target = workdir.path / run_files.REPAIRED
    if target.exists():  # left by a finish that was cut short
        workdir.check()
        paths.remove(target)
    with workdir.checkpoint(target.name) as place:
        checkpoint.save(place, repaired.config, params, repaired.provenance)
    names = ["repaired.safetensors"]
    if importlib.util.find_spec("torch"):
        names.append("repaired.pth")
    repaired = layouts.fitted(repaired, "dinov2")
    table = layouts.table_of("dinov2", repaired.config)
    for name in names:
        with workdir.output(name) as path:
            saving.save(path, repaired, table, overwrite=True)
    return ["repaired", *names]


def export_delta(
    workdir: Workdir, original: Original, eps: Mapping[str, Any]
) -> list[str]:
    """Writes `repaired.patch.safetensors`, the change alone; returns the file name.

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
        delta_file.save(path, made, model.provenance)
    return [path.name]


class Look(NamedTuple):
    """One photograph's training crop, and the last block's patch tokens of it."""

    pixels: UInt8[np.ndarray, "size size 3"]
    tokens: Float[Array, "H W D"]


class Observer:
    """Compares the repaired model with the original, on photographs.

    Args:
      model: the architecture.
      params: the original params.
      direction: singular defect direction of the original's last block.
      config: of the run: `mask_thr`, and `image_size` of the training crop in pixels.
    """

    def __init__(
        self,
        model: vit.ViTConfig,
        params: Any,
        direction: Float[Array, " D"],
        config: ConfigDict,
    ):
        self._model, self._original, self._direction = model, params, direction
        self._mask_thr, self._size = config.mask_thr, config.image_size

    def picture(self, photographs: Sequence[Photograph], params: Any) -> sinks.RGB:
        """Draws the photographs' tokens before and now, see `pictures.token_rows`."""
        from sinder_jax.plots import pictures, style  # matplotlib: not for --help

        looks = []
        for photograph in photographs:
            models = {"before": self._original, "now": params}
            seen = {
                name: self._look(photograph, each, upright=True)
                for name, each in models.items()
            }
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
        """Measures defects before and after: means over photographs, and each of them.

        Args:
          photographs: the photographs to choose from.
          params: the repaired params.
          most: the number of photographs to measure, see `spread`.

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

        def over_all(reduce: Callable[[Any], Any], name: str) -> float:
            return float(reduce([numbers[name] for numbers in each.values()]))

        pairs: dict[str, tuple[Callable[[Any], Any], str]] = {
            "defective_patches_by_direction": (np.mean, "outliers"),
            "defective_patches_by_norm": (np.mean, "large_norms"),
            "largest_to_median_norm": (max, "norm_ratio"),
        }
        return {
            "photographs": len(each),
            **{
                key: {
                    when: over_all(reduce, f"{name}_{when}")
                    for when in ("before", "after")
                }
                for key, (reduce, name) in pairs.items()
            },
            "cosine_of_sound_tokens": over_all(np.mean, "cosine_of_sound_tokens"),
            "each": each,
        }

    def _look(
        self, photograph: Photograph, params: Any, *, upright: bool = False
    ) -> Look:
        model = self._model
        photo = photograph.read(upright=upright)
        crop = decode.training_crop(photo, self._size, patch_size=model.patch_size)
        image = decode.normalize(crop, families.of(model).statistics)
        return Look(np.asarray(crop), last_patches(model, params, image))


def save_png(path: Path, rgb: sinks.RGB) -> None:
    """Writes a PNG, whole or not at all."""
    with files.replacing(path) as partial:
        Image.fromarray(rgb).save(partial, format="PNG")


def spread(
    photographs: Sequence[Photograph],
    most: int,
    say: Callable[[str], Any] = lambda line: None,
) -> list[Photograph]:
    """The first readable photograph of each of `most` equal parts of a list.

    Decodes no more photographs than needed: there may be a million. Others that it
    meets are told to `say`.
    """

    def good(part: Iterable[int]) -> Iterator[Photograph]:
        return (one for i in part if is_readable(one := photographs[i], say))

    count = len(photographs)
    parts = np.array_split(np.arange(count), min(most, count) or 1)
    return [one for part in parts for one in itertools.islice(good(part), 1)]


def describe(name: str, measures: dict[str, Any] | None) -> str:
    """One line about the measures of a set of photographs."""
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
