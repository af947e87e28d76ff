"""The job of a data-free repair: weights in, the files of any repair out.

config --> weights --datafree.repair--> repaired/, PyTorch files, delta, summary
config.data, if given --> before_after.png and measures; the repair reads none

It takes minutes, so nothing is stored on the way: a run that was killed begins again.
"""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.run import cluster, compiled, first_start, inputs, results
from experiments.run.heartbeat import Heartbeat
from experiments.run.progress import duration
from experiments.run.stopping import Stopping
from experiments.run.workdir import Workdir
from sinder_jax import cli, datafree, defects, launch, loss, model
from sinder_jax.analysis import forecast
from sinder_jax.analysis.diagnosis import CONDITIONS
from sinder_jax.data import decode, listing
from sinder_jax.data.listing import Photograph
from sinder_jax.storage import paths, run_files
from sinder_jax.storage.original import Original

NAME = "datafree"  # of config.repair


def run(args: argparse.Namespace, config: ConfigDict) -> int:
    """Repairs a model from its weights alone.

    Args:
      args: the command line of `experiments.repair`.
      config: of the run.

    Returns:
      The exit code: 0, or 75 for a run that was asked to stop.

    Raises:
      ValueError, OSError, FloatingPointError: for `launch.exit_on_error` to show.
    """
    began = time.monotonic()
    check(args, config)
    photographs = looked_at(config) if config.data else []
    if args.compilation_cache:
        compiled.keep(args.compilation_cache)
    launch.start_jax()
    with ExitStack() as stack:
        stack.enter_context(Stopping())  # at once: nothing has to be saved
        workdir = stack.enter_context(Workdir(args.workdir))
        if is_finished(workdir, config):
            print(f"{workdir.path} is finished: see {workdir.summary}")
            return 0
        workdir.write_json(run_files.CONFIG, config.to_dict())
        device = jax.devices()[0].device_kind
        heartbeat = stack.enter_context(
            Heartbeat(workdir.path, f"1 x {device}", claim=workdir.claim)
        )
        with workdir.output("planted.safetensors") as path:
            before = inputs.load_model(config, path)
            _ = before.params  # before the file is moved to its place
        summary = _repair(workdir, config, before, photographs, heartbeat)
        seconds = time.monotonic() - began
        workdir.write_summary(summary | {"seconds": round(seconds, 1)})
        if not summary["files"]:
            print(f"finished: nothing to repair, nothing exported; {summary['go_on']}")
            return 0
        if summary["has_defect_after"]:
            cli.warn("a defect is still forecast: repair the repaired model")
        gaps = (max(summary[key]) for key in ("gaps_before", "gaps_after"))
        print(
            f"finished in {duration(seconds)}, gap "
            f"{' -> '.join(f'{gap:.2f}' for gap in gaps)}: {workdir.summary}"
        )
        return 0
    return cli.TRY_AGAIN


def check(args: argparse.Namespace, config: ConfigDict) -> None:
    """Refuses what a data-free repair cannot do, before anything is written.

    Raises:
      ValueError, FileNotFoundError: says what to give.
    """
    if config.repair != NAME:
        raise ValueError(
            f"config.repair must be {NAME} here, got {config.repair!r}; for SINDER's "
            "repair choose another --config, such as giant.py"
        )
    names = ("force", "profile", *cluster.ARGUMENTS)
    given = {name: getattr(args, name) for name in names}
    flags = [
        f"--{name.replace('_', '-')}"
        for name, value in given.items()
        if not (value is None or value is False)  # 0 is the number of a process
    ]
    if flags:
        raise ValueError(
            f"{', '.join(flags)}: not for a repair without photographs, which is one "
            "process and begins again if it was killed; leave it out"
        )
    launch_ = cluster.launched(os.environ)
    if launch_ is not None and launch_.processes is not None:
        raise ValueError(
            f"{launch_.said}: a repair without photographs is one process; start it "
            f"once, or {launch_.alone}"
        )
    if not 0 < config.price < np.inf:
        raise ValueError(f"config.price must be above 0, got {config.price}")
    if config.measure_images < 1:
        raise ValueError(
            f"config.measure_images must be at least 1, got {config.measure_images}"
        )
    loss.check_loss_options(mask_thr=config.mask_thr, window=3)
    summary = paths.as_path(args.workdir) / run_files.SUMMARY
    with paths.answering(summary):
        resumes = summary.exists()
    inputs.check_weights_given(config, resumes=resumes)


def looked_at(config: ConfigDict) -> Sequence[Photograph]:
    """Photographs to look at before and after: `config.measure_images` readable ones.

    Raises:
      ValueError, OSError: there are none; says what to give.
    """
    patch_size = inputs.architecture(config).patch_size
    decode.check_side("config.image_size", config.image_size, patch_size)
    found = listing.open_photographs(config.data, print)
    some = results.spread(found, config.measure_images, print)
    if not some:
        raise ValueError(
            f"none of the {len(found)} images of {config.data} can be read, the first "
            f"is {found[0].name}"
        )
    return some


def is_finished(workdir: Workdir, config: ConfigDict) -> bool:
    """True if the workdir holds all files of this repair, finished.

    Raises:
      ValueError: it holds another run, or a repair of other weights.
      FileNotFoundError: the checkpoint does not exist, nor was it the first one.
    """
    if first_start.is_first(workdir):
        return False
    stored = first_start.stored_config(workdir)
    if changed := "; ".join(first_start.changes(stored, config).values()):
        raise ValueError(
            f"{workdir.path} holds a run with another config: {changed}; choose "
            "another --workdir"
        )
    summary = workdir.read_summary()
    if summary.get("finished") is not True:
        return False
    path = paths.as_path(config.checkpoint)
    if config.checkpoint and not path.exists():
        if config.checkpoint != stored["checkpoint"]:
            raise FileNotFoundError(f"{path} does not exist")
        cli.warn(f"{path} is gone: not compared with the weights of this repair")
    elif config.checkpoint:
        found, known = inputs.load_model(config).digest, summary["digest"]
        if found != known:
            raise ValueError(
                f"{workdir.path} holds a repair of other weights: their digest was "
                f"{known[:12]}, {path} has {found[:12]}; choose another --workdir"
            )
    lost = results.damaged(workdir, summary)
    if lost:
        cli.warn(f"{workdir.path}: missing or damaged: {', '.join(lost)}; made again")
    return not lost


def _repair(
    workdir: Workdir,
    config: ConfigDict,
    before: model.Model,
    photographs: Sequence[Photograph],
    heartbeat: Heartbeat,
) -> dict[str, Any]:
    """Repairs and writes all files but the summary, which it returns."""
    heartbeat.phase("directions")
    print(f"directions of {before.config.depth} blocks", flush=True)
    found = defects.singular_defects(before.config, before.params)
    told = forecast.forecast(before.config, before.params, found=found)
    print(told.verdict, flush=True)
    summary = {
        "finished": True,
        "model": config.model,
        "repair": NAME,
        "digest": before.digest,
        "verdict": CONDITIONS["defect" if told.has_defect else "sound"],
        "block": told.block,
        "gaps_before": told.gaps.tolist(),
    }
    if not told.has_defect:
        source = config.checkpoint or workdir.path / "planted.safetensors"
        summary |= {"files": [], "go_on": f"use {source} as it is"}
        if photographs:
            observer = observer_of(config, before, found.directions[-1])
            seen = observer.measure(photographs, before.params, len(photographs))
            assert seen is not None, "they are readable"
            summary["looked_at"] = seen
            if long := seen["defective_patches_by_norm"]["before"]:
                cli.warn(
                    f"none is forecast, but {long:.2f} patches a photograph have large "
                    "norms: a repair by photographs, such as --config=giant.py, "
                    "diagnoses tokens as well"
                )
        return summary
    heartbeat.phase("repairing")
    repaired = datafree.repair(
        before.config,
        before.params,
        found=found,
        price=config.price,
        progress=lambda line: print(line, flush=True),
    )
    heartbeat.phase("exporting")
    original = Original(before, repaired.factors, found.directions.astype(np.float32))
    files = results.export(workdir, before, repaired.params)
    files += results.export_delta(workdir, original, repaired.eps)
    measures: dict[str, Any] = {}
    if photographs:
        measures = _look(workdir, config, original, photographs, repaired.params)
        files.append("before_after.png")
    return {
        **summary,
        "changed_blocks": list(repaired.blocks),
        "largest_change_of_a_singular_value": {
            name: float(np.abs(e).max()) for name, e in repaired.eps.items()
        },
        "gaps_after": repaired.gaps_after.tolist(),
        "has_defect_after": repaired.has_defect,
        "paid": repaired.paid,
        **measures,
        "files": files,
        "sha256": results.digests(workdir, files),
    }


def observer_of(
    config: ConfigDict, before: model.Model, direction: np.ndarray
) -> results.Observer:
    """Compares models with the one before, along ν of its last block."""
    along = jax.numpy.asarray(direction, np.float32)
    return results.Observer(before.config, before.params, along, config)


def _look(
    workdir: Workdir,
    config: ConfigDict,
    original: Original,
    photographs: Sequence[Photograph],
    repaired: Any,
) -> dict[str, Any]:
    """Draws before_after.png; returns what is measured on the photographs."""
    observer = observer_of(config, original.model, original.directions[-1])
    measures = observer.measure(photographs, repaired, len(photographs))
    print(results.describe("looked at", measures))
    with workdir.output("before_after.png") as path:
        results.save_png(path, observer.picture(photographs[:2], repaired))
    return {"looked_at": measures}
