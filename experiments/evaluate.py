"""Evaluates models downstream: do their features get better by a repair?

    checkpoints, data --a protocol, model by model--> one Result each
    Results --> OUT/results.json, results.md, results.png and a line each

Several checkpoints are compared on the same images: each with the first one, with an
interval of the difference. A run that was killed continues where it was; features are
kept in OUT/features. `experiments.evaluation.protocols` says how a protocol plugs in.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sinder_jax import cli, launch

if TYPE_CHECKING:  # JAX takes seconds to import, which --help need not wait for
    from ml_collections import ConfigDict

    from experiments.evaluation.job import Result
    from sinder_jax.model import Model

EXAMPLE = """\
examples:
  python -m experiments.evaluate --config=knn.py --checkpoint=vits14 \\
      --config.data=sample:crops --workdir=evals/sample
  python -m experiments.evaluate --config=knn.py --checkpoint=vitg14 \\
      --checkpoint=runs/giant --config.data=tfds:imagenet2012 --workdir=evals/knn

A bare config name means experiments/configs/evals/; --config.KEY=VALUE changes a key.
Each model resamples its position embedding as its checkpoint says.
Exit codes: 0 finished, 2 an error reported in one line, 75 stopped and saved: start it
again, 130 a second Ctrl-C.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""
SETTINGS = "config.json"
FEATURES = "features"
STATES = "states"


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

    from experiments.evaluation import job, protocols, report
    from experiments.evaluation.progress import Progress
    from experiments.run.stopping import Stopping

    launch.start_jax()
    # First everything that can be checked before the long part begins.
    config = _config(args.config, overrides)
    protocol = protocols.module(config.protocol)
    models = open_models(args.checkpoint)
    data = protocol.prepare(config, models)
    out = Path(args.workdir)
    claim(out, config, overwrite=args.overwrite)
    with Stopping() as stopping:
        found: list[Result] = []
        with Progress() as progress:
            for name, model in zip(args.checkpoint, models, strict=True):
                progress.say(f"{name}: {config.protocol} on {config.data}")
                folder = out / STATES / state_key(config, model)
                folder.mkdir(parents=True, exist_ok=True)
                cache = Path(config.cache) if config.cache else out / FEATURES
                found.append(
                    protocol.run(
                        job.Job(config, model, data, folder, cache, progress, stopping)
                    )
                )
                model.forget()  # another may come
        rows = report.rows(config, args.checkpoint, models, found)
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
    """Opens the models; warns where a file does not tell its image statistics.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: not a model; says why.
    """
    import convert
    from convert.commands import lines

    models = [convert.open_model(path) for path in checkpoints]
    for path, model in zip(checkpoints, models, strict=True):
        for note in lines.untold_statistics(model):
            cli.warn(f"{path}: {note}")
    return models


def state_key(config: "ConfigDict", model: "Model") -> str:
    """Names the folder of what an evaluation keeps: one for each model and config."""
    from experiments.evaluation import job

    facts = [job.model_key(model), settings(config)]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings(config: "ConfigDict") -> dict[str, str | int | float | bool]:
    """The settings that decide a result: not how photographs are read or kept."""
    ignored = ("read_threads", "read_workers", "cache")
    return {name: config[name] for name in sorted(config) if name not in ignored}


def claim(out: Path, config: "ConfigDict", *, overwrite: bool) -> None:
    """Makes the workdir, or goes on in one that holds an evaluation by this config.

    Args:
      out: the workdir.
      config: of the evaluation.
      overwrite: True takes over whatever the folder holds.

    Raises:
      FileExistsError: it holds something else, and `overwrite` is False.
    """
    from sinder_jax.storage import files

    kept = out / SETTINGS
    if out.exists() and not overwrite:
        try:
            there = json.loads(kept.read_text())
        except FileNotFoundError:
            there = None if any(out.iterdir()) else settings(config)
        except ValueError:
            there = None
        if there != settings(config):
            what = "an evaluation by other settings" if there else "something else"
            raise FileExistsError(
                f"{out} holds {what}: choose another --workdir or add --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)
    files.write(kept, json.dumps(settings(config), indent=2) + "\n")


if __name__ == "__main__":
    launch.exit_on_error(main)
