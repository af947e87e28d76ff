"""`diff`: what a repair changed, as a delta.

base, repaired --difference.extract--> delta        run --its ε--> delta
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import opening
from convert.commands import lines
from sinder_jax import checkpoint, delta, difference, param_tree
from sinder_jax import model as models
from sinder_jax.storage import array_store, delta_file, original, run_files
from sinder_jax.storage import paths as storage_paths


def diff(
    paths: Sequence[Path],
    destination: Path,
    residual: float = difference.ROUNDING,
    **told: Any,
) -> None:
    """Writes what a repair changed; prints what was found.

    Args:
      paths: a base and its repaired model, in any layout, or the workdir of a run.
      destination: a .safetensors file that does not exist.
      residual: how much of a kernel may be left out, relative to its norm.
      **told: what the files do not say, as for `convert.open_model`.
    """
    if len(paths) > 2:
        raise ValueError(
            f"got {len(paths)} models, expected BASE REPAIRED DELTA or RUN DELTA"
        )
    if not 0 < residual < 1:
        raise ValueError(f"got residual {residual}, expected a part of 1 such as 1e-3")
    if destination.suffix != ".safetensors":
        raise ValueError(f"got {destination}, expected a .safetensors file for a delta")
    storage_paths.check_apart(destination, *paths)
    array_store.check_destination(destination)
    if len(paths) == 1:
        made, provenance = _of_run(paths[0])
    else:
        made, provenance = _between(*paths, residual=residual, told=told)
    delta_file.save(destination, made, provenance)
    print(lines.about_delta(made))
    size = destination.stat().st_size
    print(f"{destination}: {size:,} bytes, for the model with digest {made.base}.")


def _between(
    base_path: Path, repaired_path: Path, *, residual: float, told: Mapping[str, Any]
) -> tuple[delta.Delta, Mapping[str, Any]]:
    base, repaired = (
        opening.open_model(path, **told) for path in (base_path, repaired_path)
    )
    if different := models.differences(base.config, repaired.config):
        raise ValueError(f"the architectures differ in {different}")
    both_have_mask_token = not any(
        model.torch and model.torch.fills_mask_token for model in (base, repaired)
    )
    made, found = difference.extract(
        base.config,
        base.params,
        repaired.params,
        compare_mask_token=both_have_mask_token,
        residual=residual,
        before_svd=lines.RunningSVD(),
    )
    name, rest = found.largest_rest
    print(
        f"note: left out as rounding: up to {rest:.1e} of a kernel's norm ({name}); "
        f"{len(found.rounding_only)} of {len(found.differences)} tensors that differ "
        "differ by rounding alone."
    )
    return made, base.provenance


def _of_run(workdir: Path) -> tuple[delta.Delta, Mapping[str, Any]]:
    """ε of a run's newest state, which is its last one if the run has ended."""
    frozen, states = workdir / run_files.FROZEN, workdir / run_files.STATES
    if not (frozen.is_dir() and states.is_dir()):
        raise ValueError(
            f"{workdir} is not a workdir of experiments.repair with a state in it; "
            "give such a workdir, or BASE and REPAIRED"
        )
    before = original.load(frozen)
    newest = checkpoint.load_newest(states)
    if newest is None:
        raise ValueError(f"{workdir}: the run has no state yet")
    for error in newest.damaged.values():
        print(f"note: {error}; taking the state before")
    original.check_basis(frozen, before, newest.metadata)
    model, eps = before.model, param_tree.flatten(newest.tree["eps"])
    made = delta.from_eps(model.config, model.params, before.factors, eps)
    print(f"{workdir}: ε after {newest.metadata['num_images']} images")
    return made, model.provenance
