"""The job of a data-free repair: weights in, the files of any repair out.

config --> weights --datafree.repair--> repaired/, PyTorch files, delta, summary
config.data, if given --> before_after.png and measures; the repair reads none
"""

import argparse
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.run import inputs, results
from experiments.run.progress import duration
from experiments.run.workdir import Workdir
from sinder_jax import cli, datafree, defects, launch, loss, model
from sinder_jax.analysis import forecast
from sinder_jax.analysis.diagnosis import CONDITIONS
from sinder_jax.storage import run_files
from sinder_jax.storage.original import Original

NAME = "datafree"  # of config.repair


def run(args: argparse.Namespace, config: ConfigDict) -> int:
    """Repairs a model from its weights alone; returns the exit code, 0.

    Args:
      args: the command line of `experiments.repair`.
      config: of the run.

    Raises:
      ValueError, OSError, FloatingPointError: for `launch.exit_on_error` to show.
    """
    began = time.monotonic()
    check(args, config)
    sets = {}
    if config.data:
        sets["looked_at"], _ = inputs.photographs(config)
    launch.start_jax()
    with Workdir(args.workdir) as workdir:
        path = workdir.path / run_files.CONFIG
        if path.exists() and run_files.read_json(path) != config.to_dict():
            raise ValueError(
                f"{workdir.path} holds a run with another config; choose another "
                "--workdir"
            )
        if workdir.summary.exists():
            print(f"{workdir.path} is finished: see {workdir.summary}")
            return 0
        workdir.write_json(run_files.CONFIG, config.to_dict())
        with workdir.output("planted.safetensors") as path:
            before = inputs.load_model(config, path)
            _ = before.params  # before the file is moved to its place
        print(f"directions of {before.config.depth} blocks", flush=True)
        found = defects.singular_defects(before.config, before.params)
        told = forecast.forecast(before.config, before.params, found=found)
        print(told.verdict, flush=True)
        summary = {"finished": True, "model": config.model, "repair": NAME}
        summary["forecast"] = {"block": told.block, "gaps": told.gaps.tolist()}
        if not told.has_defect:
            summary |= {"verdict": CONDITIONS["sound"], "files": []}
            workdir.write_summary(summary)
            print("finished: nothing to repair, nothing exported")
            return 0
        repaired = datafree.repair(
            before.config,
            before.params,
            found=found,
            price=config.price,
            progress=lambda line: print(line, flush=True),
        )
        summary |= _write(workdir, config, before, found, repaired, sets)
        if repaired.has_defect:
            cli.warn("a defect is still forecast: repair the repaired model")
        seconds = time.monotonic() - began
        workdir.write_summary(summary | {"seconds": round(seconds, 1)})
        print(
            f"finished in {duration(seconds)}, gap {repaired.gaps_before.max():.2f} -> "
            f"{repaired.gaps_after.max():.2f}: {workdir.summary}"
        )
    return 0


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
    if config.plant:
        raise ValueError(
            f"config.plant={config.plant} needs photographs; give the planted model by "
            "--config.checkpoint"
        )
    if args.profile or args.compilation_cache:
        raise ValueError(
            "--profile and --compilation-cache are for repairs by photographs; leave "
            "them out"
        )
    if not 0 < config.price < np.inf:
        raise ValueError(f"config.price must be above 0, got {config.price}")
    if config.measure_images < 1:
        raise ValueError(
            f"config.measure_images must be at least 1, got {config.measure_images}"
        )
    loss.check_loss_options(mask_thr=config.mask_thr, window=3)
    inputs.check_weights_given(config)


def _write(
    workdir: Workdir,
    config: ConfigDict,
    before: model.Model,
    found: defects.SingularDefects,
    repaired: datafree.Repaired,
    sets: dict,
) -> dict:
    """Writes the repaired model and measures it; returns lines of the summary."""
    directions = found.directions.astype(np.float32)
    original = Original(before, repaired.factors, directions)
    files = results.export(workdir, before, repaired.params)
    files += results.export_delta(workdir, original, repaired.eps)
    measures = {}
    if sets:
        direction = jax.numpy.asarray(directions[-1])
        observer = results.Observer(before.config, before.params, direction, config)
        for name, photographs in sets.items():
            some = results.spread(photographs, config.measure_images)
            measures[name] = observer.measure(some, repaired.params, len(some))
            print(results.describe(name.replace("_", " "), measures[name]))
            with workdir.output("before_after.png") as path:
                picture = observer.picture(some[:2], repaired.params)
                results.save_png(path, picture)
        files.append("before_after.png")
    return {
        "changed_blocks": list(repaired.blocks),
        "largest_change_of_a_singular_value": {
            name: float(np.abs(e).max()) for name, e in repaired.eps.items()
        },
        "gaps_after": repaired.gaps_after.tolist(),
        "has_defect_after": repaired.has_defect,
        "price": repaired.price,
        **measures,
        "files": files,
        "sha256": results.digests(workdir, files),
    }
