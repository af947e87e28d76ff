"""The main job: repairs a DINOv2 and writes the repaired model for JAX and PyTorch.

    config --> photographs, weights --> factors, directions --> step, ... --> export

Everything goes into the workdir (`run.workdir` lists the files). Started again with the
same workdir, the run continues where it was: after a kill, on other devices, in another
number of processes. A run that is asked to stop saves its state and ends with exit code
75.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import config as config_files
from experiments.run import (
    cluster,
    compiled,
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
from experiments.run.runner import Runner, choose_devices, on_host
from experiments.run.stopping import Stopping
from experiments.run.workdir import Workdir
from sinder_jax import cli, families, launch, repair
from sinder_jax.data import batches
from sinder_jax.storage import original as stored
from sinder_jax.storage.run_files import read_metrics

EXAMPLE = """\
examples:
  python -m experiments.repair --config=tiny.py --workdir=runs/demo
  python -m experiments.repair --config=giant.py --workdir=runs/giant \\
      --config.checkpoint=dinov2_vitg14 --config.data=folder:/data/imagenet/train

A bare config name means experiments/configs/; --config.KEY=VALUE changes a key of it.
Like the authors, a repair does not turn photographs as their EXIF says.
docs/pods.md has the lines for TPU pods and clusters. Exit codes: 0 finished, 2 an error
reported in one line, 75 stopped and saved: start it again, 130 a second Ctrl-C.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""


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
    args, overrides = _parser().parse_known_args(argv)
    config = config_files.load(args.config)
    config_files.override(config, overrides)
    options = inputs.repair_options(config)
    inputs.check_weights_given(config, resumes=inputs.resumes(args.workdir))
    sinks.check_packages(config)
    span = tracing.parse(args.profile) if args.profile else None
    if args.compilation_cache:
        compiled.keep(args.compilation_cache)
    with ExitStack() as stack:
        stopping = stack.enter_context(Stopping())

        # Data, then the workdir: one list, one config, one folder for all processes.
        processes = stack.enter_context(cluster.start(args))
        launch.start_jax()
        first, say = processes.is_first, processes.say
        train, held_out = inputs.photographs(config, say=say)
        workdir = stack.enter_context(
            Workdir(
                args.workdir,
                writes=first,
                keep_last=config.keep_states,
                keep_every=config.keep_every,
            )
        )
        processes.check_same("configs", config.to_json(sort_keys=True))
        processes.check_same("photographs", "\n".join(photo.name for photo in train))
        processes.check_shared(workdir.path)
        # images_per_step is part of the result; devices only divide its images.

        def settle() -> None:
            first_start.check_weights(workdir, config)
            first_start.settle_config(
                workdir, config, jax.device_count(), force=args.force
            )
            stamped = first_start.stamps(train)
            first_start.settle_photographs(workdir, stamped, force=args.force)

        processes.in_first(settle)
        batch = int(processes.from_first(np.array(config.images_per_step)))
        if not first:
            first_start.settle_config(workdir, config, batch, force=args.force)
        batches.check_resize(config.resize, batch)
        devices = choose_devices(batch, processes.processes)
        told = workdir.read_summary() if first else {}
        finished = told.get("finished") is True
        lost = results.damaged(workdir, told) if finished else []
        if finished:
            workdir.rewind_metrics(told["images"])
        if processes.from_first(np.array(finished and not lost)):
            say(f"{workdir.path} is finished: see {workdir.summary}")
            return 0

        # Devices: those of all processes that share the images of a step.
        used = f"{len(devices)} x {devices[0].device_kind}"
        heartbeat = stack.enter_context(
            Heartbeat(
                workdir.path,
                used,
                processes.processes,
                writes=first,
                claim=workdir.claim,
            )
        )
        say(
            f"{len(train)} photographs to repair on, {len(held_out)} others held out\n"
            f"{batch} image{'s' * (batch > 1)} per step on {used}"
        )

        # Model, factors and directions: computed once, read by every start and process.
        newest = workdir.load_state() if first else None
        if lost:
            results.check_can_be_made(workdir, lost, newest)
        original = inputs.stored_original(workdir, newest) if first else None
        processes.barrier()  # a damaged one is out of the way
        if first and original is None:
            inputs.prepare(config, workdir, heartbeat.phase)
        while not workdir.frozen.exists():  # not in a collective, which may time out
            time.sleep(1.0)
        processes.barrier()
        heartbeat.phase("loading")
        original = original or stored.load(workdir.frozen)
        if newest is not None:
            stored.check_basis(workdir.frozen, original, newest.metadata)
        model, params = original.model.config, original.model.params
        with on_host():  # the runner copies to each device, or splits over them
            frozen, state = repair.init(
                model, params, options, original.directions, original.factors
            )

        # Resume: process 0 has read the newest good state and sends it to the others.
        if processes.from_first(np.array(newest is not None)):
            saved = newest.tree if newest else repair.to_saved(state)
            saved = processes.from_first(saved)
            state = repair.from_saved(model, params, frozen, saved)
            say(f"resuming after {int(state.num_images)} images")
        start = position = int(state.num_images)
        counts = Counts()
        if first:
            workdir.rewind_metrics(position)
        if newest:
            counts = Counts.stored(newest.metadata, read_metrics(workdir.path))

        # Step: the frozen arrays and the state on the devices.
        done = bool(repair.is_done(options, state))
        observer = results.Observer(model, params, frozen.directions[-1], config)
        runner = Runner(
            model, options, frozen, state, devices, split=config.split_model
        )

        # Loop. A step's metrics are read after the next step is dispatched, so that the
        # device never waits; once the run is done, that next step changes nothing.
        heartbeat.phase("repairing")
        stopping.finish_steps()
        vote = Vote(processes, devices)
        stream = batches.stream(
            train,
            config.image_size,
            patch_size=model.patch_size,
            statistics=families.of(model).statistics,
            start=position,
            batch_size=batch,
            part=(processes.process, processes.processes),
            num_threads=config.read_threads,
            num_workers=config.read_workers,
            resize=config.resize,
        )
        boards = sinks.Sinks()
        if first:
            boards = sinks.open_sinks(config, workdir.path, start=start)
        with (
            closing(stream),
            boards,
            LiveLine(config, start=start, shown=first) as live,
            tracing.Tracer(span if first else None, workdir.path) as tracer,
        ):
            journal = Journal(
                config, train, workdir, live, boards, heartbeat, counts, done
            )
            pending: Dispatched | None = None
            while not (journal.done or journal.stop):
                images = next(stream)
                for message in images.errors:
                    live.print(f"skipped, unreadable: {message}")
                if first:
                    workdir.check()
                tracer.at(position, pending)
                metrics = runner.step(images)
                newer = Dispatched(position, metrics, vote(stopping.asked is not None))
                position += batch
                if pending is not None:
                    journal.read(pending)
                pending = newer
                # A process that runs alone need not ask the others.
                due = passes(config.checkpoint_every, position, batch)
                if due or newer.vote is True:
                    journal.read(pending)
                    pending = None
                    save(workdir, runner, counts, original.digest)
                if passes(config.picture_every, position, batch) and not journal.done:
                    now = runner.params()
                    if first:
                        picture = observer.picture(results.spread(train, 1), now)
                        name = f"pictures/image_{position:08d}.png"
                        with workdir.output(name) as path:
                            results.save_png(path, picture)
                        boards.picture("tokens", picture, position)
            if pending is not None:
                journal.read(pending)
        save(workdir, runner, counts, original.digest)
        if journal.stop:
            stopped_by = stopping.asked or "a signal to another process"
            if first:
                write_stopped(workdir, config, counts, stopped_by)
            heartbeat.phase(f"stopped: {stopped_by}")
            return cli.TRY_AGAIN

        # Finish: files of the repaired model, measures, the summary.
        stopping.finish_steps(False)  # all that follows can be done again
        heartbeat.phase("exporting")
        saved, repaired = runner.saved(), runner.params()
        if not first:
            return 0
        sets = {"repaired_on": train, "held_out": held_out}
        written = results.write(
            workdir, config, original, observer, sets, saved, repaired
        )
        write_finished(workdir, config, counts, written, time.monotonic() - began)
        return 0
    return cli.TRY_AGAIN  # told to stop where nothing had to be saved


def save(workdir: Workdir, runner: Runner, counts: Counts, basis: str) -> None:
    """Starts to save the state and the counts up to it, if this process writes.

    `basis` is the digest of the factors that its ε belongs to.
    """
    if workdir.writes:
        saved = runner.saved()
        metadata = {"counts": dataclasses.asdict(counts), stored.BASIS: basis}
        workdir.save_state(int(saved["num_images"]), saved, metadata)


def write_stopped(
    workdir: Workdir, config: ConfigDict, counts: Counts, stopped_by: str
) -> None:
    """Writes the summary of a run that will go on, and says so."""
    workdir.write_summary(
        {
            "finished": False,
            "model": config.model,
            "stopped_by": stopped_by,
            "go_on": own_command(),
            **dataclasses.asdict(counts),
        }
    )
    print(
        f"stopped after {counts.images} images, all saved in {workdir.path}: run the "
        "same command to resume"
    )


def write_finished(
    workdir: Workdir,
    config: ConfigDict,
    counts: Counts,
    written: Mapping[str, Any],
    seconds: float,
) -> None:
    """Writes the summary of a finished run, with what `results.write` returned."""
    workdir.write_summary(
        {
            "finished": True,
            "model": config.model,
            **dataclasses.asdict(counts),
            **written,
            "seconds": round(seconds, 1),
        }
    )
    unreadable = len(counts.unreadable_files)
    skipped = f", {unreadable} unreadable files skipped" if unreadable else ""
    print(
        f"finished after {counts.images} images{skipped} in {duration(seconds)}: "
        f"{workdir.summary}"
    )


def passes(every: int, position: int, batch: int) -> bool:
    """True if the last `batch` images passed a multiple of `every`."""
    return position // every > (position - batch) // every


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
