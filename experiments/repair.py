"""The main job: repairs a DINOv2 and writes the repaired model for JAX and PyTorch.

    config --> photographs, weights --> diagnosis --> factors --> step, ... --> export

Everything goes into the workdir (`run.workdir` lists the files). Started again with the
same workdir, the run continues where it was: after a kill, on other devices, in another
number of processes. A run that is asked to stop saves its state and ends with exit code
75.
"""

import argparse
import dataclasses
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import config as config_files
from experiments.run import (
    cluster,
    compiled,
    datafree_run,
    diagnosis,
    first_start,
    inputs,
    results,
    sinks,
    tracing,
)
from experiments.run.cluster import Vote
from experiments.run.heartbeat import Heartbeat, own_command
from experiments.run.journal import Counts, Dispatched, Journal
from experiments.run.progress import LiveLine, duration
from experiments.run.runner import Runner, choose_devices
from experiments.run.stopping import Stopping
from experiments.run.workdir import Workdir, check_free
from sinder_jax import cli, families, launch, repair
from sinder_jax.checkpoint import Newest
from sinder_jax.data import batches
from sinder_jax.data.listing import Photograph
from sinder_jax.placement import on_host
from sinder_jax.storage.original import BASIS, Original

EXAMPLE = """\
examples:
  python -m experiments.repair --config=tiny.py --workdir=runs/demo
  python -m experiments.repair --config=giant.py --workdir=runs/giant \\
      --config.checkpoint=dinov2_vitg14 --config.data=folder:/data/imagenet/train
  python -m experiments.repair --config=datafree.py --workdir=runs/datafree \\
      --config.checkpoint=dinov2_vitg14      # from the weights alone

A bare config name means experiments/configs/; --config.KEY=VALUE changes a key of it.
A run begins with a diagnosis, and ends there with exit code 0 if the model has no
singular defect; --config.diagnose=off repairs it all the same.
Like the authors, a repair does not turn photographs as their EXIF says.
docs/pods.md has the lines for TPU pods and clusters. Exit codes: 0 finished, 2 an error
reported in one line, 75 stopped and saved: start it again, 130 a second Ctrl-C.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""


class Run(NamedTuple):
    """What a start has settled before the long part.

    Attributes:
      config: of the run; `images_per_step` is that of its first start.
      processes: of the run; only the first one writes and prints.
      stopping: hears that this start is to stop.
      train, held_out: the photographs to repair on, and the others.
      workdir: where everything is written.
      lost: files of a finished run that have to be made again; None before its end.
      devices: of all processes, those that share the images of a step.
      heartbeat: shows others what this start is doing.
    """

    config: ConfigDict
    processes: cluster.Cluster
    stopping: Stopping
    train: list[Photograph]
    held_out: list[Photograph]
    workdir: Workdir
    lost: list[str] | None
    devices: tuple[jax.Device, ...]
    heartbeat: Heartbeat


class Start(NamedTuple):
    """Where a start goes on.

    Attributes:
      original: model, factors and directions before the repair.
      runner: holds the state, on the devices.
      observer: compares the repaired model with the original.
      counts: of the images before; the loop goes on counting.
      done: True if the stopping rule holds already.
    """

    original: Original
    runner: Runner
    observer: results.Observer
    counts: Counts
    done: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a repair, or resumes one that was stopped.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code: 0, or 75 for a run that was asked to stop.

    Raises:
      ValueError, OSError, FloatingPointError: for `launch.exit_on_error` to show.
    """
    # Config. All that can be checked is checked before the long part begins.
    began = time.monotonic()
    args, config = settings(argv)
    check_free(args.workdir)
    if "repair" in config:
        return datafree_run.run(args, config)
    options = inputs.repair_options(config)
    inputs.check_plant(config)
    inputs.check_weights_given(config, resumes=inputs.resumes(args.workdir))
    sinks.check_packages(config)
    span = tracing.parse(args.profile) if args.profile else None
    if args.compilation_cache:
        compiled.keep(args.compilation_cache)
    with ExitStack() as stack:
        # Processes, photographs, workdir, devices.
        run = settle(args, config, stack)
        if run is None:
            return 0
        first, workdir = run.processes.is_first, run.workdir

        # Diagnosis: a model without a singular defect needs no repair.
        newest = workdir.load_state() if first else None
        if run.lost:
            results.check_can_be_made(workdir, run.lost, newest)
        weights = inputs.Weights(config, workdir, newest, run.heartbeat.phase)
        diagnosed = diagnosis.of_all(run.processes, weights, run.train)
        if diagnosed.ends:
            if first:
                diagnosis.finish(workdir, config, diagnosed)
            return 0
        options = diagnosed.options(options, config.first_block)

        # Model, factors and directions: computed once, read by every start and process.
        original = inputs.original_of_all(run.processes, weights)

        # Loop, from the newest state until the stopping rule holds.
        start = resume(run, options, original, newest)
        run.heartbeat.phase("repairing")
        run.stopping.finish_steps()
        if loop(run, start, span if first else None):
            stopped_by = run.stopping.asked or "a signal to another process"
            if first:
                write_stopped(run, start.counts, stopped_by)
            run.heartbeat.phase(f"stopped: {stopped_by}")
            return cli.TRY_AGAIN

        # Finish: files of the repaired model, measures, the summary.
        run.stopping.finish_steps(False)  # all that follows can be done again
        run.heartbeat.phase("exporting")
        saved, repaired = start.runner.saved(), start.runner.params()
        if first:
            sets = {"repaired_on": run.train, "held_out": run.held_out}
            written = results.write(
                workdir, config, original, start.observer, sets, saved, repaired
            )
            written |= diagnosed.summary(workdir)
            write_finished(run, start.counts, written, time.monotonic() - began)
        return 0
    return cli.TRY_AGAIN  # told to stop where nothing had to be saved


def settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """The command line, and the config that it names and overrides.

    Args:
      argv: as of `main`.

    Raises:
      ValueError, FileNotFoundError: there is no such config, or no such key in it.
    """
    args, overrides = _parser().parse_known_args(argv)
    config = config_files.load(args.config, whole=_whole)
    config_files.override(config, overrides)
    return args, config


def settle(
    args: argparse.Namespace, config: ConfigDict, stack: ExitStack
) -> Run | None:
    """Settles what the long part needs; returns None if the run is finished.

    Args:
      args: the command line.
      config: its `images_per_step` becomes that of the first start.
      stack: closes what is opened here.
    """
    stopping = stack.enter_context(Stopping())
    processes = stack.enter_context(cluster.start(args))
    launch.start_jax()
    first, say = processes.is_first, processes.say
    train, held_out = inputs.photographs(config, say=say)
    workdir = stack.enter_context(
        Workdir(
            args.workdir,
            first,
            keep_last=config.keep_states,
            keep_every=config.keep_every,
        )
    )
    first_start.settle(processes, workdir, config, train, force=args.force)
    batch = config.images_per_step  # part of the result; devices only divide them
    devices = choose_devices(batch, processes.processes)
    lost = results.lost(workdir) if first else None
    if processes.from_first(np.array(lost == [])):
        say(f"{workdir.path} is finished: see {workdir.summary}")
        return None
    used = f"{len(devices)} x {devices[0].device_kind}"
    heartbeat = stack.enter_context(
        Heartbeat(
            workdir.path, used, processes.processes, writes=first, claim=workdir.claim
        )
    )
    say(
        f"{len(train)} photographs to repair on, {len(held_out)} others held out\n"
        f"{batch} image{'s' * (batch > 1)} per step on {used}"
    )
    return Run(
        config, processes, stopping, train, held_out, workdir, lost, devices, heartbeat
    )


def resume(
    run: Run, options: repair.RepairOptions, original: Original, newest: Newest | None
) -> Start:
    """Puts the newest state, or that before the first image, on the devices.

    Args:
      run: as settled.
      options: of the step.
      original: model, factors and directions.
      newest: the newest state; None on a first start, and in all processes but one.
    """
    processes, workdir = run.processes, run.workdir
    model, params = original.model.config, original.model.params
    with on_host():  # the runner copies to each device, or splits over them
        frozen, state = repair.init(
            model, params, options, original.directions, original.factors
        )
    # Process 0 has read the newest good state and sends it to the others.
    if processes.from_first(np.array(newest is not None)):
        saved = newest.tree if newest else repair.to_saved(state)
        saved = processes.from_first(saved)
        state = repair.from_saved(model, params, frozen, saved)
        processes.say(f"resuming after {int(state.num_images)} images")
    counts = Counts(images=int(state.num_images))
    if processes.is_first:
        workdir.rewind_metrics(counts.images)
    if newest:
        counts = Counts(**newest.metadata["counts"])
    done = bool(repair.is_done(options, state))
    observer = results.Observer(model, params, frozen.directions[-1], run.config)
    split = run.config.split_model
    runner = Runner(model, options, frozen, state, run.devices, split=split)
    return Start(original, runner, observer, counts, done)


def loop(run: Run, start: Start, span: tracing.Span | None) -> bool:
    """Repairs until the stopping rule holds; returns True if told to stop before.

    A step's metrics are read after the next step is dispatched, so that the device
    never waits; once the run is done, that next step changes nothing.

    Args:
      run: as settled.
      start: where to begin.
      span: of images to trace.
    """
    config, workdir, counts = run.config, run.workdir, start.counts
    position, batch = counts.images, config.images_per_step
    vote = Vote(run.processes, run.devices)
    boards = sinks.Sinks()
    if workdir.writes:
        boards = sinks.open_sinks(config, workdir.path, start=position)
    with (
        closing(stream(run, start)) as batches_of_images,
        boards,
        LiveLine(config, start=position, shown=workdir.writes) as live,
        tracing.Tracer(span, workdir.path) as tracer,
    ):
        journal = Journal(
            config, run.train, workdir, live, boards, run.heartbeat, counts, start.done
        )
        pending: Dispatched | None = None
        while not (journal.done or journal.stop):
            images = next(batches_of_images)
            for message in images.errors:
                live.print(f"skipped, unreadable: {message}")
            if workdir.writes:
                workdir.check()
            tracer.at(position, pending)
            metrics = start.runner.step(images)
            newer = Dispatched(position, metrics, vote(run.stopping.asked is not None))
            position += batch
            if pending is not None:
                journal.read(pending)
            pending = newer
            # A process that runs alone need not ask the others.
            due = passes(config.checkpoint_every, position, batch)
            if due or newer.vote is True:
                journal.read(pending)
                pending = None
                save(workdir, start)
            if passes(config.picture_every, position, batch) and not journal.done:
                now = start.runner.params()  # of all processes, if they split the model
                if workdir.writes:
                    picture = start.observer.picture(results.spread(run.train, 1), now)
                    name = f"pictures/image_{position:08d}.png"
                    with workdir.output(name) as path:
                        results.save_png(path, picture)
                    boards.picture("tokens", picture, position)
        if pending is not None:
            journal.read(pending)
    save(workdir, start)
    return journal.stop


def stream(run: Run, start: Start) -> Generator[batches.Batch, None, None]:
    """This process's part of the images of each step, from the start on."""
    config, model = run.config, start.original.model.config
    return batches.stream(
        run.train,
        config.image_size,
        patch_size=model.patch_size,
        statistics=families.of(model).statistics,
        start=start.counts.images,
        batch_size=config.images_per_step,
        part=(run.processes.process, run.processes.processes),
        num_threads=config.read_threads,
        num_workers=config.read_workers,
        resize=config.resize,
    )


def save(workdir: Workdir, start: Start) -> None:
    """Starts to save the state and the counts up to it, if this process writes."""
    if workdir.writes:
        saved, counts = start.runner.saved(), dataclasses.asdict(start.counts)
        metadata = {"counts": counts, BASIS: start.original.digest}
        workdir.save_state(int(saved["num_images"]), saved, metadata)


def write_stopped(run: Run, counts: Counts, stopped_by: str) -> None:
    """Writes the summary of a run that will go on, and says so."""
    told = {"finished": False, "model": run.config.model, "stopped_by": stopped_by}
    told["go_on"] = own_command()
    run.workdir.write_summary(told | dataclasses.asdict(counts))
    print(
        f"stopped after {counts.images} images, all saved in {run.workdir.path}: run "
        "the same command to resume"
    )


def write_finished(
    run: Run, counts: Counts, written: Mapping[str, Any], seconds: float
) -> None:
    """Writes the summary of a finished run, with what `results.write` returned."""
    told = {"finished": True, "model": run.config.model, **dataclasses.asdict(counts)}
    run.workdir.write_summary({**told, **written, "seconds": round(seconds, 1)})
    unreadable = len(counts.unreadable_files)
    skipped = f", {unreadable} unreadable files skipped" if unreadable else ""
    print(
        f"finished after {counts.images} images{skipped} in {duration(seconds)}: "
        f"{run.workdir.summary}"
    )


def passes(every: int, position: int, batch: int) -> bool:
    """True if the last `batch` images passed a multiple of `every`."""
    return position // every > (position - batch) // every


def _whole(config: ConfigDict) -> str:
    """The config that has all keys of this kind of repair."""
    return "datafree.py" if "repair" in config else "giant.py"


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.repair",
        description="Repair the singular defects of a DINOv2.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="settings of the run")
    add(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where everything is written: a folder, or gs://BUCKET/NAME",
    )
    add(
        "--force",
        action="store_true",
        help="resume even if the config or the list of photographs has changed, which "
        "affects the result",
    )
    add(
        "--profile",
        metavar="START:STOP",
        help="write a trace of the devices to DIR/profile, from image START to STOP",
    )
    add(
        "--compilation-cache",
        metavar="FOLDER",
        help="cache compiled programs in this folder for later starts; off by default",
    )
    cluster.add_arguments(parser)
    return parser


if __name__ == "__main__":
    launch.exit_on_error(main)
