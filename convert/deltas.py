"""`diff` and `apply`: what a repair changed, and a model repaired by it.

base, repaired --diff--> delta      run --diff--> delta
base, delta --apply--> the repaired model, in the base's own layout
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import report, source, stream
from convert.files import sha256, writing
from sinder_jax import checkpoint, delta, param_tree, vit
from sinder_jax import model as models
from sinder_jax.model import Model
from sinder_jax.storage import array_store, delta_file, original, run_files


def diff(
    paths: Sequence[Path],
    destination: Path,
    num_heads: int | None = None,
    residual: float = delta.ROUNDING,
) -> None:
    """Writes what a repair changed as a delta; prints what was found.

    Args:
      paths: a base and its repaired model, in any layout, or the workdir of a run.
      destination: a .safetensors file that does not exist.
      num_heads: None: what the files say, or embed_dim // 64.
      residual: how much of a kernel may be left out, relative to its norm.
    """
    if len(paths) > 2:
        raise ValueError("diff takes BASE REPAIRED DELTA, or RUN DELTA.")
    if not 0 < residual < 1:
        raise ValueError(f"residual is {residual}: a part of 1 is meant, such as 1e-3.")
    _check_is_safetensors(destination)
    checkpoint.check_destination(destination)
    if len(paths) == 1:
        made, provenance = _delta_of_run(paths[0])
    else:
        base, repaired = (source.open_model(path, num_heads) for path in paths)
        made, found = _extract(base, repaired, residual)
        provenance = dict(base.provenance)
        for line in _reported(found):
            print(f"note: {line}")
    delta_file.save(destination, made, {"provenance": json.dumps(provenance)})
    for line in report.about_delta(made):
        print(line)
    size = destination.stat().st_size
    print(f"{destination}: {size:,} bytes, for the model with digest {made.base}.")


def _check_is_safetensors(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a delta is a .safetensors file.")


def _extract(
    base: Model, repaired: Model, residual: float
) -> tuple[delta.Delta, delta.Report]:
    _check_architectures(base.config, repaired.config)
    has_mask_token = [
        model.torch is None or not model.torch.fills_mask_token
        for model in (base, repaired)
    ]
    return delta.extract(
        base.config,
        base.params,
        repaired.params,
        compare_mask_token=all(has_mask_token),
        residual=residual,
        progress=_Progress(),
    )


def _delta_of_run(workdir: Path) -> tuple[delta.Delta, dict[str, Any]]:
    """ε of the newest state of a run, which is its last one where it has ended."""
    frozen, states = workdir / run_files.FROZEN, workdir / run_files.STATES
    if not (frozen.is_dir() and states.is_dir()):
        raise ValueError(
            f"{workdir} is no workdir of experiments.repair with a state in it; give "
            "that, or BASE and REPAIRED."
        )
    model, factors, _ = original.load(frozen)
    newest = checkpoint.load_newest(states)
    if newest is None:
        raise ValueError(f"{workdir}: the run has no state yet.")
    for error in newest.damaged.values():
        print(f"note: {error} The one before is taken.")
    made = delta.from_eps(
        model.config, model.params, factors, param_tree.flatten(newest.tree["eps"])
    )
    print(f"{workdir}: ε after {newest.metadata['num_images']} images")
    return made, dict(model.provenance)


def apply(
    base: Path,
    delta_path: Path,
    destination: Path,
    scale: float = 1.0,
    num_heads: int | None = None,
) -> None:
    """Writes a repaired model in the layout of its base; prints what was checked.

    Args:
      base: the model that the delta was made for, in any layout.
      delta_path: from `diff`.
      destination: a file or, where the base is one, a directory that does not exist.
      scale: the share of the change that is applied, above 0 to 1.
      num_heads: None: what the files say, or embed_dim // 64.
    """
    delta.check_scale(scale)
    as_directory = base.is_dir()
    check = checkpoint.check_destination if as_directory else writing.check_destination
    check(destination)
    repair, _ = delta_file.load(delta_path)
    model = source.open_model(base, num_heads)
    report.print_notes(model)
    _check_architectures(repair.config, model.config)
    delta.check_base(repair, model.digest)
    step = (
        f"apply {delta_path.name}, SHA-256 {sha256.of_file(delta_path)}, scale "
        f"{scale:g}, {array_store.tool()}"
    )

    progress = _Progress()

    def leaf(path: str) -> np.ndarray:
        return delta.repaired_leaf(repair, path, model.leaf(path), scale, progress)

    repaired = dataclasses.replace(
        model.with_step(step), leaf=leaf, known_digest=None, sha256={}
    )
    if model.torch is None:
        found = models.save(destination, repaired)
    else:
        found = stream.to_files(
            repaired,
            destination,
            model.torch.table,
            as_directory=as_directory,
            files=model.torch.extra,
        )
    for line in report.about_delta(repair):
        print(line)
    report.print_proof(
        destination, model.config, model.num_tensors, found, f", {model.layout} layout"
    )


def _check_architectures(base: vit.ViTConfig, other: vit.ViTConfig) -> None:
    if different := models.differences(base, other):
        raise ValueError(f"the architectures differ in {different}")


class _Progress:
    """Says which kernel's SVD is under way: the giant's 160 take minutes."""

    def __init__(self):
        self._last = None

    def __call__(self, name: str, block: int) -> None:
        if sys.stderr.isatty():
            print(f"\rSVD of {name}, block {block} ", end="", file=sys.stderr)
        elif self._last != name:
            print(f"SVDs of {name}", flush=True)
        self._last = name


def _reported(found: delta.Report) -> Iterator[str]:
    name, rest = found.largest_rest
    yield (
        f"left out as rounding: up to {rest:.1e} of a kernel's norm ({name}); "
        f"{len(found.rounding_only)} of {len(found.differences)} tensors that differ "
        "differ by rounding alone."
    )
