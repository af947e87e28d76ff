"""The main job: repairs a DINOv2 and writes the repaired model for JAX and PyTorch.

    config --> photographs, weights --> factors, directions --> step, ... --> export

Everything goes into the workdir (`experiments.workdir` lists the files). Started again
with the same workdir, the run goes on where it was.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import cli, inputs, results
from experiments import config as config_files
from experiments.progress import Progress, duration
from experiments.workdir import Workdir, write_text
from sinder_jax import checkpoint, data, defects, factor, pictures, repair, vit

PER_IMAGE = ("layer", "loss", "alpha", "num_outliers", "finite")
FACTORS = ("u", "sigma", "v")
EXAMPLE = """\
examples:
  python -m experiments.repair --config=tiny.py --workdir=runs/demo
  python -m experiments.repair --config=giant.py --workdir=runs/giant \\
      --config.checkpoint=dinov2_vitg14 --config.data=/data/imagenet/train

A bare config name means experiments/configs/; --config.KEY=VALUE changes a key of it.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a repair to its end, or on from where it was stopped.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code, 0.

    Raises:
      ValueError, OSError, FloatingPointError: what `cli.exit_on_error` shows the user.
    """
    began = time.monotonic()

    # Config: whatever can be told to be wrong is, before the long part begins.
    args, overrides = _parser().parse_known_args(argv)
    config = config_files.load(args.config)
    config_files.override(config, overrides)
    options = inputs.repair_options(config)
    inputs.check_weights_given(config)
    train, held_out = inputs.photographs(config)
    workdir = Workdir(args.workdir)

    # Devices: images_per_step is part of the result, the devices only divide it.
    workdir.settle_config(config, images_per_step=jax.local_device_count())
    batch = config.images_per_step
    devices = tuple(jax.local_devices()[: math.gcd(batch, jax.local_device_count())])
    if workdir.summary.exists():
        print(f"{workdir.path} is finished: see {workdir.summary}")
        return 0
    print(f"{len(train)} photographs to repair on, {len(held_out)} others held out")
    print(f"{batch} images a step on {len(devices)} x {devices[0].device_kind}")

    # Weights, factors and directions: computed once, stored, read by every resume.
    if not workdir.frozen.exists():
        freeze(config, workdir)
    model, params, factors, directions, provenance = thaw(workdir)
    frozen, state = repair.init(model, params, options, directions, factors)
    del factors

    # Resume.
    saved = workdir.load_state()
    if saved is not None:
        state = repair.from_saved(model, params, frozen, saved)
        print(f"going on after {int(state.num_images)} images")
    position = int(state.num_images)
    workdir.rewind_metrics(position)

    # Step and stream.
    runner = Runner(model, options, frozen, state, devices)
    observer = results.Observer(
        model,
        params,
        frozen.directions[-1],
        mask_thr=config.mask_thr,
        size=config.image_size,
    )
    watched = results.spread(train, 1) + results.spread(held_out, 1)
    stream = data.stream(
        train,
        config.image_size,
        start=position,
        batch_size=batch,
        num_threads=config.read_threads,
    )

    # Loop. Metrics are fetched one step late, so that the device never waits; once the
    # stopping rule holds, the step in between changes nothing.
    done = bool(repair.is_done(options, state))
    pending: tuple[data.Batch, repair.Metrics] | None = None
    watch = Watch(config, train)
    with Progress(config, start=position) as progress:
        while not done:
            images = next(stream)
            watch.unreadable(images, progress)
            newer = (images, runner.step(images))
            position += batch
            if pending is not None:
                done = log(workdir, progress, watch, *pending)
            pending = newer
            if passes(config.checkpoint_every, position, batch):
                done = log(workdir, progress, watch, *pending) or done
                pending = None
                workdir.save_state(position, repair.to_saved(runner.state))
            if passes(config.picture_every, position, batch) and not done:
                now = repair.merged_params(frozen, runner.state)
                workdir.pictures.mkdir(exist_ok=True)
                target = workdir.pictures / f"image_{position:08d}.png"
                pictures.save_png(target, observer.closing_figure(watched[:1], now))
        if pending is not None:
            log(workdir, progress, watch, *pending)
    stream.close()

    # Finish.
    state = runner.state
    workdir.save_state(int(state.num_images), repair.to_saved(state))
    repaired = repair.merged_params(frozen, state)
    files = results.export(workdir, model, repaired, provenance)
    files += results.export_patch(workdir, model, params, frozen, state, provenance)
    figure = observer.closing_figure(watched, repaired)
    pictures.save_png(workdir.path / "before_after.png", figure)
    measures = {
        "repaired_on": observer.measure(train, repaired, config.measure_images),
        "held_out": observer.measure(held_out, repaired, config.measure_images),
    }
    summary = {
        "finished": True,
        "model": config.model,
        **run_summary(workdir, state),
        **measures,
        "files": [*files, "before_after.png"],
        "seconds": round(time.monotonic() - began, 1),
    }
    write_text(workdir.summary, json.dumps(summary, indent=2) + "\n")
    for name, numbers in measures.items():
        print(results.describe(name.replace("_", " "), numbers))
    unreadable = len(summary["unreadable_files"])
    print(
        f"finished after {summary['images']} images"
        f"{f', {unreadable} unreadable files skipped' if unreadable else ''} in "
        f"{duration(time.monotonic() - began)}: {workdir.summary}"
    )
    return 0


# --- Weights --------------------------------------------------------------------------


def freeze(config: ConfigDict, workdir: Workdir) -> None:
    """Loads the original weights, computes factors and directions, stores all three."""
    model, params, provenance = inputs.load_model(
        config, workdir.path / "planted.safetensors"
    )
    vit.patch_grid(model, config.image_size, config.image_size)
    began = time.monotonic()
    print(f"directions of {model.depth} blocks, {config.method}", flush=True)
    found = defects.singular_defects(
        model,
        params,
        config.method,
        key=jax.random.key(config.seed),
        num_probes=config.num_probes,
    )
    print(f"singular values of {4 * model.depth} kernels", flush=True)
    factors = factor.factorize(model, params)
    print(f"both took {duration(time.monotonic() - began)}", flush=True)
    tree = {
        "params": params,
        "factors": {
            part: checkpoint.unflatten(getattr(factors, part)) for part in FACTORS
        },
        "directions": np.asarray(found.directions),
    }
    header = {
        "config": dataclasses.asdict(model),
        "gaps": found.gaps.tolist(),
        "provenance": provenance,
    }
    checkpoint.save_tree(workdir.frozen, tree, header)


class Thawed(NamedTuple):
    """What `freeze` stored."""

    model: vit.ViTConfig
    params: dict[str, Any]
    factors: factor.Factors
    directions: np.ndarray
    provenance: dict[str, Any]


def thaw(workdir: Workdir) -> Thawed:
    """Reads what `freeze` stored."""
    tree, header = checkpoint.load_tree(workdir.frozen)
    model = vit.ViTConfig(**header["config"])
    return Thawed(
        model,
        tree["params"],
        factor.Factors(
            **{part: checkpoint.flatten(tree["factors"][part]) for part in FACTORS}
        ),
        tree["directions"],
        header["provenance"],
    )


# --- The loop's parts -----------------------------------------------------------------


class Runner:
    """The state and the step that moves it, on one device or several."""

    def __init__(
        self,
        model: vit.ViTConfig,
        options: repair.RepairOptions,
        frozen: repair.Frozen,
        state: repair.RepairState,
        devices: tuple[jax.Device, ...],
    ):
        self._devices = devices
        self._step = repair.make_step(model, options)
        if len(devices) > 1:
            self._step = repair.make_pmapped_step(model, options, devices)
            frozen = repair.replicate(frozen, devices)
            state = repair.replicate(state, devices)
        self._frozen, self._state = frozen, state

    @property
    def state(self) -> repair.RepairState:
        """The state as it is after the last step."""
        several = len(self._devices) > 1
        return repair.unreplicate(self._state) if several else self._state

    def step(self, batch: data.Batch) -> repair.Metrics:
        """Dispatches a step on a batch; its metrics are not waited for."""
        lead = (len(self._devices), -1) if len(self._devices) > 1 else (-1,)
        self._state, metrics = self._step(
            self._state,
            self._frozen,
            batch.images.reshape(*lead, *batch.images.shape[1:]),
            batch.valid.reshape(lead),
        )
        return metrics


class Watch:
    """Ends a run in which nothing can be read, or nothing is finite."""

    def __init__(self, config: ConfigDict, train: Sequence[Path]):
        self.train = train
        self._config, self._unreadable_in_row = config, 0

    def unreadable(self, batch: data.Batch, progress: Progress) -> None:
        """Names files that cannot be read.

        Raises:
          ValueError: as many in a row as there are files.
        """
        for message in batch.errors:
            progress.print(f"skipped, unreadable: {message}")
        bad = 0 if batch.valid.any() else self._unreadable_in_row + len(batch.valid)
        self._unreadable_in_row = bad
        if bad >= len(self.train):
            raise ValueError(
                f"none of the {len(self.train)} images of {self._config.data} "
                "can be read"
            )

    def bad(self, in_row: int, file: str) -> None:
        """Raises FloatingPointError when too many images in a row are not finite."""
        if in_row >= self._config.max_bad_steps:
            raise FloatingPointError(
                f"{in_row} images in a row gave tokens, loss or gradient that are not "
                f"finite, the last {file}: the weights may be damaged, or lr is too "
                f"large (config.lr={self._config.lr}, config.max_bad_steps)"
            )


def log(
    workdir: Workdir,
    progress: Progress,
    watch: Watch,
    batch: data.Batch,
    metrics: repair.Metrics,
) -> bool:
    """Writes and shows the metrics of a step; says whether the run is done."""
    values = {name: np.ravel(x) for name, x in metrics._asdict().items()}
    rows: list[dict[str, Any]] = []
    for i, position in enumerate(batch.positions):
        valid, counted = bool(batch.valid[i]), bool(values["counted"][i])
        if position >= values["num_images"][0]:
            break  # past the end of the run
        row = {
            "image": int(position),
            "file": str(watch.train[position % len(watch.train)]),
            "readable": valid,
        }
        for name in PER_IMAGE:
            value = values[name][i].item()
            finite = counted and math.isfinite(value)
            row[name] = value if finite else None
        rows.append(row | {"skipped": float(values["skipped"][0])})
    workdir.append_metrics(rows)
    if rows:
        progress.update(rows[-1]["image"] + 1, rows[-1])
        watch.bad(int(values["bad_in_row"][0]), rows[-1]["file"])
    return bool(values["done"][0])


def passes(every: int, position: int, batch: int) -> bool:
    """Whether the last `batch` images led past a multiple of `every`."""
    return position // every > (position - batch) // every


def run_summary(workdir: Workdir, state: repair.RepairState) -> dict[str, Any]:
    """How the run went, from its metrics and its last state."""
    rows = workdir.read_metrics()
    eps = {name: np.asarray(e) for name, e in state.eps.items()}
    changed = np.any([np.any(e, axis=1) for e in eps.values()], axis=0)
    return {
        "images": int(state.num_images),
        "images_with_defect": sum(row["layer"] not in (None, -1) for row in rows),
        "images_not_finite": int(state.num_bad),
        "unreadable_files": sorted({r["file"] for r in rows if not r["readable"]}),
        "share_of_last_images_without_defect": float(
            np.mean(~np.asarray(state.had_defect))
        ),
        "changed_blocks": np.flatnonzero(changed).tolist(),
        "largest_change_of_a_singular_value": {
            name: float(np.abs(e).max()) for name, e in eps.items()
        },
    }


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.repair",
        description="Repair the singular defects of a DINOv2.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="settings of the run")
    add("--workdir", required=True, metavar="DIR", help="where everything is written")
    return parser


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.exit_on_error(main)
