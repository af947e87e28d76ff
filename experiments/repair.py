"""The main job: repairs a DINOv2 and writes the repaired model for JAX and PyTorch.

    config --> photographs, weights --> factors, directions --> step, ... --> export

Everything goes into the workdir (`run.workdir` lists the files). Started again with the
same workdir, the run goes on where it was: after a kill, with other devices, in another
number of processes. Told to stop, it saves and ends with exit code 75.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import config as config_files
from experiments.run import cluster, compiled, inputs, results, sharing, sinks, tracing
from experiments.run.cluster import Cluster, Vote
from experiments.run.heartbeat import Heartbeat, own_command, refuse_if_alive
from experiments.run.journal import Dispatched, Journal
from experiments.run.progress import Progress, duration
from experiments.run.runner import Runner, choose_devices, on_host
from experiments.run.stopping import Stopped, Stopping
from experiments.run.workdir import Workdir
from sinder_jax import cli, families, param_tree, repair
from sinder_jax.data import batches
from sinder_jax.data.listing import Photograph
from sinder_jax.storage import original as stored
from sinder_jax.storage.original import Original

EXAMPLE = """\
examples:
  python -m experiments.repair --config=tiny.py --workdir=runs/demo
  python -m experiments.repair --config=giant.py --workdir=runs/giant \\
      --config.checkpoint=dinov2_vitg14 --config.data=folder:/data/imagenet/train

A bare config name means experiments/configs/; --config.KEY=VALUE changes a key of it.
docs/pods.md has the lines for TPU pods and clusters. Exit codes: 0 finished, 2 an error
that one line tells, 75 stopped and saved: start it again, 130 a second Ctrl-C.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""


class Job(NamedTuple):
    """What this process knows of the run from its start on."""

    config: ConfigDict
    options: repair.RepairOptions
    processes: Cluster
    workdir: Workdir
    stopping: Stopping
    train: Sequence[Photograph]
    held_out: Sequence[Photograph]

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """Those that share the images of a step, of all processes."""
        return choose_devices(self.config.images_per_step, self.processes.processes)

    @property
    def devices_as_text(self) -> str:
        """Such as "8 x TPU v4"."""
        return f"{len(self.devices)} x {self.devices[0].device_kind}"

    @property
    def stopped_by(self) -> str:
        """The signal that stopped the run."""
        return self.stopping.asked or "a signal to another process"


class Course(NamedTuple):
    """Where the run stands: the state in motion, and what it is held against."""

    original: Original
    runner: Runner
    observer: results.Observer
    position: int
    done: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a repair to its end, or on from where it was stopped.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code: 0, or 75 for a run that was told to stop.

    Raises:
      ValueError, OSError, FloatingPointError: what `cli.exit_on_error` shows the user.
    """
    began = time.monotonic()
    # Whatever can be told to be wrong is, before the long part begins.
    args, overrides = _parser().parse_known_args(argv)
    config = config_files.load(args.config)
    config_files.override(config, overrides)
    options = inputs.repair_options(config)
    inputs.check_weights_given(config)
    sinks.check_packages(config)
    span = tracing.parse(args.profile) if args.profile else None
    if args.compilation_cache:
        compiled.keep(args.compilation_cache)
    try:
        with Stopping() as stopping, cluster.start(args) as processes:
            listed = inputs.photographs(config, say=processes.say)
            with Workdir(
                args.workdir,
                writes=processes.is_first,
                keep_last=config.keep_states,
                keep_every=config.keep_every,
            ) as workdir:
                job = Job(config, options, processes, workdir, stopping, *listed)
                settle(job, force=args.force)
                if processes.from_first(np.array(workdir.finished())):
                    processes.say(f"{workdir.path} is finished: see {workdir.summary}")
                    return 0
                with Heartbeat(
                    workdir.path,
                    devices=job.devices_as_text,
                    processes=processes.processes,
                    writes=workdir.writes,
                ) as heartbeat:
                    course = begin(job, heartbeat)
                    heartbeat.phase("repairing")
                    if loop(job, course, heartbeat, span):
                        finish(job, course, heartbeat, began)
                        return 0
                    heartbeat.phase(f"stopped: {job.stopped_by}")
                    return cli.TRY_AGAIN
    except Stopped as stopped:
        print(f"stopped by {stopped}: the same command goes on", file=sys.stderr)
        return cli.TRY_AGAIN


# --- The run, in order ----------------------------------------------------------------


def settle(job: Job, *, force: bool) -> None:
    """One config, one list of photographs and one workdir for all processes.

    Raises:
      ValueError: they differ, or the workdir holds another run or is another run's.
    """
    config, processes, workdir = job.config, job.processes, job.workdir
    processes.check_same("configs", config.to_json(sort_keys=True))
    processes.check_same("photographs", "\n".join(each.name for each in job.train))
    if processes.processes > 1:
        sharing.check(workdir.path, processes)
    # images_per_step is part of the result, the devices only divide it.
    if processes.is_first:
        refuse_if_alive(workdir.path)
        workdir.settle_config(config, images_per_step=jax.device_count(), force=force)
    batch = int(processes.from_first(np.array(config.images_per_step)))
    if not processes.is_first:
        workdir.settle_config(config, images_per_step=batch, force=force)
    batches.check_resize(config.resize, batch)
    choose_devices(batch, processes.processes)


def begin(job: Job, heartbeat: Heartbeat) -> Course:
    """Weights, factors and directions, and the newest state, if there is one."""
    config, processes, workdir = job.config, job.processes, job.workdir
    processes.say(
        f"{len(job.train)} photographs to repair on, {len(job.held_out)} others held "
        f"out\n{config.images_per_step} images a step on {job.devices_as_text}"
    )
    # Computed once, stored, read by every process and every resume.
    if processes.is_first and not workdir.frozen.exists():
        inputs.prepare(config, workdir, heartbeat.phase)
    while not workdir.frozen.exists():  # not in a collective, which may time out
        time.sleep(1.0)
    processes.barrier()
    heartbeat.phase("loading")
    original = stored.load(workdir.frozen)
    model, params = original.model.config, original.model.params
    with on_host():  # the runner makes a copy for each device, or splits it over them
        frozen, state = repair.init(
            model, params, job.options, original.directions, original.factors
        )
    # Process 0 reads the newest good state, and all others have it from there.
    saved = workdir.load_state() if processes.is_first else None
    if processes.from_first(np.array(saved is not None)):
        saved = processes.from_first(saved or repair.to_saved(state))
        state = repair.from_saved(model, params, frozen, saved)
        processes.say(f"going on after {int(state.num_images)} images")
    position = int(state.num_images)
    if workdir.writes:
        workdir.rewind_metrics(position)
    observer = results.Observer(
        model,
        params,
        frozen.directions[-1],
        mask_thr=config.mask_thr,
        size=config.image_size,
    )
    done = bool(repair.is_done(job.options, state))
    runner = Runner(
        model, job.options, frozen, state, job.devices, split=config.split_model
    )
    return Course(original, runner, observer, position, done)


def loop(
    job: Job, course: Course, heartbeat: Heartbeat, span: tracing.Span | None
) -> bool:
    """Steps until the run is done, which gives True, or told to stop.

    A step's metrics are read after the next one is dispatched, so that the device never
    waits; once the stopping rule holds, the step in between changes nothing.
    """
    config, processes, workdir = job.config, job.processes, job.workdir
    runner, position, batch = course.runner, course.position, config.images_per_step
    model = course.original.model.config
    job.stopping.finish_steps()
    vote = Vote(processes, job.devices)
    stream = batches.stream(
        job.train,
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
    if workdir.writes:
        boards = sinks.open_sinks(config, workdir.path, start=position)
    with (
        closing(stream),
        boards,
        Progress(config, start=position, shown=processes.is_first) as progress,
        tracing.Tracer(span if workdir.writes else None, workdir.path) as tracer,
    ):
        journal = Journal(config, job.train, workdir, progress, boards, heartbeat)
        journal.done = course.done
        pending: Dispatched | None = None
        while not (journal.done or journal.stop):
            images = next(stream)
            for message in images.errors:
                progress.print(f"skipped, unreadable: {message}")
            tracer.at(position, pending)
            metrics = runner.step(images)
            newer = Dispatched(position, metrics, vote(job.stopping.asked is not None))
            position += batch
            if pending is not None:
                journal.read(pending)
            pending = newer
            # Alone, nobody else has to be asked.
            if passes(config.checkpoint_every, position, batch) or newer.vote is True:
                journal.read(pending)
                pending = None
                save(job, runner)
            if passes(config.picture_every, position, batch) and not journal.done:
                now = runner.params()
                if workdir.writes:
                    picture = course.observer.picture(watch(job)[:1], now)
                    boards.picture("tokens", picture, position)
                    with workdir.output(f"pictures/image_{position:08d}.png") as path:
                        results.save_png(path, picture)
        if pending is not None:
            journal.read(pending)
    save(job, runner)
    if journal.stop:
        leave(job)
    return not journal.stop


def leave(job: Job) -> None:
    """Says where a run stands that was told to stop, and how to go on."""
    if not job.workdir.writes:
        return
    summary = {
        "finished": False,
        "model": job.config.model,
        "stopped_by": job.stopped_by,
        "go_on": own_command(),
        **results.run_summary(job.workdir),
    }
    job.workdir.write_summary(summary)
    print(
        f"stopped after {summary['images']} images, all saved in {job.workdir.path}: "
        "the same command goes on"
    )


def finish(job: Job, course: Course, heartbeat: Heartbeat, began: float) -> None:
    """Exports the repaired model, measures it, and writes the summary."""
    job.stopping.finish_steps(False)  # all that follows can be done again
    heartbeat.phase("exporting")
    config, workdir, original = job.config, job.workdir, course.original
    saved, repaired = course.runner.saved(), course.runner.params()
    if not workdir.writes:
        return
    files = results.export(workdir, original.model, repaired)
    files += results.export_delta(workdir, original, param_tree.flatten(saved["eps"]))
    with workdir.output("before_after.png") as path:
        results.save_png(path, course.observer.picture(watch(job), repaired))
    sets = {"repaired_on": job.train, "held_out": job.held_out}
    measures = {
        name: course.observer.measure(photographs, repaired, config.measure_images)
        for name, photographs in sets.items()
    }
    summary = {
        "finished": True,
        "model": config.model,
        **results.run_summary(workdir),
        **results.change_summary(saved),
        **measures,
        "files": [*files, "before_after.png"],
        "seconds": round(time.monotonic() - began, 1),
    }
    workdir.write_summary(summary)
    for name, numbers in measures.items():
        print(results.describe(name.replace("_", " "), numbers))
    unreadable = len(summary["unreadable_files"])
    print(
        f"finished after {summary['images']} images"
        f"{f', {unreadable} unreadable files skipped' if unreadable else ''} in "
        f"{duration(time.monotonic() - began)}: {workdir.summary}"
    )


# --- Parts ----------------------------------------------------------------------------


def save(job: Job, runner: Runner) -> None:
    """Starts to save the state, if this process writes."""
    if job.workdir.writes:
        saved = runner.saved()
        job.workdir.save_state(int(saved["num_images"]), saved)


def watch(job: Job) -> list[Photograph]:
    """The photographs whose pictures are drawn."""
    return results.spread(job.train, 1) + results.spread(job.held_out, 1)


def passes(every: int, position: int, batch: int) -> bool:
    """True if the last `batch` images led past a multiple of `every`."""
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
        help="go on with a config that changes the result",
    )
    add(
        "--profile",
        metavar="START:STOP",
        help="trace the devices between two numbers of images, into DIR/profile",
    )
    add(
        "--compilation-cache",
        metavar="FOLDER",
        help="keep compiled programs there for the next start; off by default",
    )
    cluster.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    cli.exit_on_error(main)
