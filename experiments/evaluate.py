"""Evaluates models downstream: do their features get better by a repair?

    checkpoints, remedies of the first one --remedied.forms--> Jobs
    Jobs, data --a protocol, one by one--> one Result each
    Results --> OUT/results.json, results.md, results.png and a line each

Several checkpoints are compared on the same images: each with the first one, with an
interval of the difference. A run that was killed continues where it was; features are
kept in OUT/features. `experiments.evaluation.protocols` says how a protocol plugs in,
`experiments.evaluation.remedied` what a remedy is to it.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_jax import cli, launch

if TYPE_CHECKING:  # JAX takes seconds to import, which --help need not wait for
    from ml_collections import ConfigDict

    from experiments.evaluation.job import Job, Result
    from experiments.evaluation.protocols import Module
    from experiments.evaluation.remedied import Remedies
    from sinder_jax.model import Model

EXAMPLE = """\
examples:
  python -m experiments.evaluate --config=knn.py --checkpoint=vits14 \\
      --config.data=sample:crops --workdir=evals/sample
  python -m experiments.evaluate --config=knn.py --checkpoint=vitg14 \\
      --checkpoint=runs/giant --config.data=tfds:imagenet2012 --workdir=evals/knn
  python -m experiments.evaluate --config=artifacts.py --checkpoint=vitg14 \\
      --config.data=photos --config.remedies=ablation,data-free --workdir=evals/meter

A bare config name means experiments/configs/evals/; --config.KEY=VALUE changes a key.
Each model resamples its position embedding as its checkpoint says.
Exit codes: 0 finished, 2 an error reported in one line, 75 stopped and saved: start it
again, 130 a second Ctrl-C.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""
SETTINGS = "config.json"
FEATURES = "features"
STATES = "states"
# Keys of a config that may change from one start to the next.
FREE = ("read_threads", "read_workers", "cache", "save_every", "resamples", "pictures")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates each checkpoint and compares them.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code: 0, or 75 for an evaluation that was told to stop.

    Raises:
      ValueError, OSError, ImportError, FloatingPointError: errors for
        `launch.exit_on_error` to show.
    """
    args, overrides = _parser().parse_known_args(argv)

    from experiments.evaluation import job, protocols, remedied, report
    from experiments.evaluation.progress import Progress
    from experiments.run.stopping import Stopping

    launch.start_jax()
    # First everything that can be checked before the long part begins.
    config = _config(args.config, overrides)
    protocol = protocols.module(config.protocol)
    models = open_models(args.checkpoint)
    remedies = remedied.prepare(config)
    data = protocol.prepare(config, models)
    with (
        claimed(args.workdir, config, models, overwrite=args.overwrite) as out,
        Stopping() as stopping,
        Progress() as progress,
    ):
        cache = Path(config.cache) if config.cache else out / FEATURES
        first = job.Job(config, models[0], data, out, cache, progress, stopping)
        found = _evaluated(args, protocol, remedies, first, models)
        rows = report.rows(config, *found)
        report.write(out, rows)
        for line in report.lines(rows):
            print(cli.shown(line))
        print(f"written to {out / report.TABLE}, {report.JSON} and {report.PLOT}")
        return 0
    return cli.TRY_AGAIN


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.evaluate",
        description="Evaluate models by what their frozen features are good for.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="protocol, such as knn.py")
    add(
        "--checkpoint",
        action="append",
        required=True,
        metavar="DIR",
        help="model: a checkpoint, the workdir of a repair, or a PyTorch file in any "
        "layout; given several times, the others are compared with the first",
    )
    add("--workdir", required=True, metavar="DIR", help="where results are written")
    add("--overwrite", action="store_true", help="replace other results there")
    return parser


def _config(name: str, overrides: Sequence[str]) -> "ConfigDict":
    from experiments import config as config_files
    from experiments.evaluation import protocols

    folder = config_files.CONFIGS / "evals"
    config = config_files.load(
        name, folder, lambda c: f"{protocols.check_name(c.get('protocol'))}.py"
    )
    protocol = config.protocol
    config_files.override(config, overrides)
    if config.protocol != protocol:
        raise ValueError(
            f"--config.protocol={config.protocol}: choose the protocol by --config="
        )
    return config


def open_models(checkpoints: Sequence[str]) -> "list[Model]":
    """Opens the models; warns of what decides features and no file tells.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: not a model, or the same path twice; says why.
    """
    import convert
    from convert.commands import lines
    from experiments.evaluation import images
    from sinder_jax.storage import paths

    places: dict[str, str] = {}
    for path in checkpoints:
        place = str(paths.located(path))
        place = place if paths.is_remote(place) else os.path.realpath(place)
        if place in places:
            others = "" if places[place] == path else f", first as {places[place]}"
            raise ValueError(f"got --checkpoint={path} more than once{others}")
        places[place] = path
    models = [convert.open_model(path) for path in checkpoints]
    for path, model in zip(checkpoints, models, strict=True):
        if untold := "; ".join(lines.untold(model)):
            cli.warn(
                f"{path}: no file tells {untold}; what is in brackets is taken, unless "
                "`python -m convert to-jax` writes a checkpoint that says otherwise"
            )
    for model in models[1:]:
        if different := images.differently_resampled(models[0], model):
            cli.warn(
                f"{different}: except at the size of the embedding, that is a part of "
                "their difference"
            )
    return models


def _evaluated(
    args: argparse.Namespace,
    protocol: "Module",
    remedies: "Remedies",
    first: "Job",
    models: "Sequence[Model]",
) -> "tuple[list[str], list[str], list[Result]]":
    """Evaluates each checkpoint, and of the first one also what remedies make of it.

    Returns names, digests and results, in the order of the rows.
    """
    from experiments.evaluation import images, remedied

    names, digests, results = [], [], []
    for checkpoint, model in zip(args.checkpoint, models, strict=True):
        mine = remedies if model is models[0] else remedied.NONE
        for form in remedied.forms(mine, first._replace(model=model), checkpoint):
            config = form.job.config
            form.job.progress.say(f"{form.name}: {config.protocol} on {config.data}")
            folder = first.folder / STATES / state_key(form.job)
            folder.mkdir(parents=True, exist_ok=True)
            told = {
                **remedied.kept_cost(form, folder),
                "positions": images.resampling(model),
            }
            job = form.job._replace(folder=folder)
            found = _run(protocol, job, overwrite=args.overwrite)
            names.append(form.name)
            digests.append(job.model.digest)
            results.append(
                found._replace(
                    evaluated={**found.evaluated, **told},
                    details={**found.details, **form.details},
                )
            )
        model.forget()  # another may come
    return names, digests, results


def _run(protocol: "Module", job: "Job", *, overwrite: bool) -> "Result":
    """Runs a protocol; `overwrite` removes trainings that it cannot go on with.

    Others go on, so that the same command may be started again after a stop.
    """
    from experiments.evaluation import training

    while True:
        try:
            return protocol.run(job)
        except training.Unusable as error:
            if not overwrite:
                raise
            cli.warn(f"{error.folder} cannot be continued: removed by --overwrite")
            shutil.rmtree(error.folder)


def state_key(job: "Job") -> str:
    """Names the folder of what an evaluation keeps: one for each model and config."""
    from experiments.evaluation import remedied

    told = settings(job.config)
    facts = [
        job.features_key,
        {key: value for key, value in told.items() if key not in remedied.KEYS},
    ]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a result: not how it is read, kept or reported."""
    return {name: config[name] for name in sorted(config) if name not in FREE}


@contextlib.contextmanager
def claimed(
    workdir: str, config: "ConfigDict", models: "Sequence[Model]", *, overwrite: bool
) -> Iterator[Path]:
    """Makes the workdir, or goes on in one with the same settings; one process a time.

    Args:
      workdir: a folder of a disk.
      config: of the evaluation.
      models: to evaluate; results of others are not replaced.
      overwrite: True replaces all of that.

    Raises:
      FileExistsError: it holds a repair; or something else, and `overwrite` is False.
      NotADirectoryError: it is a file.
      ValueError: another process evaluates there; or the folder is in a bucket.
    """
    from sinder_jax.storage import files, paths, run_files

    if paths.is_remote(workdir):
        raise ValueError(f"--workdir={workdir}: got a bucket, expected a folder")
    out = Path(workdir)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(
            f"--workdir={out}: got a file, expected a folder or the name of a new one"
        )
    if run_files.holds(out) == run_files.REPAIR:
        raise FileExistsError(
            f"{out} holds {run_files.REPAIR}: choose another --workdir"
        )
    if out.exists() and not overwrite and (what := _foreign(out, config, models)):
        raise FileExistsError(
            f"{out} holds {what}: choose another --workdir or add --overwrite"
        )
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        _lock(folder, out)
        files.write(out / SETTINGS, json.dumps(settings(config), indent=2) + "\n")
        yield out
    finally:
        os.close(folder)  # unlocks it


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process evaluates in {out}: wait for it, or choose another "
            "--workdir"
        ) from None


def _foreign(out: Path, config: "ConfigDict", models: "Sequence[Model]") -> str:
    """What a folder holds that is not of this evaluation; empty if nothing."""
    from experiments.evaluation import report

    try:
        there = json.loads((out / SETTINGS).read_text())
        if not isinstance(there, dict) or "protocol" not in there:
            raise TypeError("expected the settings of an evaluation")
        there = settings(there)
        results = out / report.JSON
        rows = json.loads(results.read_text()) if results.exists() else []
        # A remedied model comes with the first checkpoint and these settings.
        found = [
            (str(row["digest"]), str(row["checkpoint"]))
            for row in rows
            if "remedy" not in row
        ]
    except FileNotFoundError:
        return "something else" if any(out.iterdir()) else ""
    except (ValueError, KeyError, TypeError):
        return "files that are damaged, or something else"
    now = settings(config)
    if there != now:
        told = ", ".join(
            f"{key} {_told(there, key)} then, {_told(now, key)} now"
            for key in sorted({*there, *now})
            if _told(there, key) != _told(now, key)
        )
        return f"an evaluation by other settings ({told})"
    kept = Counter(model.digest for model in models)
    for digest, checkpoint in found:
        if not kept[digest]:
            return f"the results of {checkpoint}"
        kept[digest] -= 1  # two checkpoints may have the same weights
    return ""


def _told(given: Mapping[str, Any], key: str) -> str:
    return repr(given[key]) if key in given else "unknown"


if __name__ == "__main__":
    launch.exit_on_error(main)
