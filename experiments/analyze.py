"""Every figure of the paper for any model, the numbers behind them, and a report.

    checkpoint, images --steps, kept in OUT/cache--> numbers
    numbers --> OUT/NAME.png, NAME.pdf, NAME.npz, analysis.json and report.html

With several checkpoints, each gets a folder of its own, and OUT/survey.md one line.
With --compare, a second model such as the repaired model is compared with the first,
whose directions are the yardstick for both. A second run with the same --out computes
only what is new.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.study import figures
from sinder_jax import cli, launch

if TYPE_CHECKING:  # JAX takes seconds to import, which --help need not wait for
    from experiments.study.numbers import Subject
    from experiments.study.options import Options
    from experiments.study.photos import Photo

EXAMPLE = """\
examples:
  python -m experiments.analyze --checkpoint=vitg14 --compare=run/repaired \\
      villa.png photos/ --report --out=analysis
  python -m experiments.analyze --checkpoint=vitg14 --figures=forecast,spectra
  python -m experiments.analyze --checkpoint=UNI2-h --checkpoint=Virchow2 \\
      --figures=forecast --out=survey

figures:
{figures}

SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""
SUMMARY, REPORT, CACHE = "analysis.json", "report.html", "cache"
SURVEY = "survey"


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and writes.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code: 0.

    Raises:
      ValueError, OSError, ImportError, FloatingPointError: errors for
        `launch.exit_on_error` to show.
    """
    args, overrides = _parser().parse_known_args(argv)

    from experiments.study import survey
    from experiments.study.photos import unique_names
    from sinder_jax.storage import files

    launch.start_jax()
    # First everything that can be checked before the long part begins.
    options, antialias, checkpoints = _settings(args, overrides)
    names = figures.check_names(
        args.figures.split(","), photos=bool(args.images), compare=bool(args.compare)
    )
    out = Path(args.out)
    if len(checkpoints) == 1:
        jobs = {out.name: _job(checkpoints[0], args, options, antialias, out)}
    else:
        jobs = {
            name: _job(checkpoint, args, options, antialias, out / name)
            for checkpoint, name in zip(
                checkpoints, unique_names(list(map(Path, checkpoints))), strict=True
            )
        }
    for job in jobs.values():
        claim(job.out, job.subjects[0].model.digest, overwrite=args.overwrite)
    found = {name: _analyze(job, names, args.report) for name, job in jobs.items()}
    if len(found) > 1:
        rows = survey.rows(found)
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        files.write(out / f"{SURVEY}.json", text)
        files.write(out / f"{SURVEY}.md", survey.table(rows))
        print(f"\n{survey.table(rows)}\nwritten to {out / SURVEY}.md and .json")
    return 0


class _Job(NamedTuple):
    """What is studied, and where the results go."""

    subjects: "list[Subject]"
    registers: "Subject | None"
    photos: "list[Photo]"
    options: "Options"
    out: Path


def _job(
    checkpoint: str, args: Any, options: "Options", antialias: bool | None, out: Path
) -> _Job:
    """Opens models and photographs; errors as for `open_models`.

    Without --config photographs get the size of the model's own grid.
    """
    from convert.commands import lines
    from experiments.study.photos import collect, read_photos
    from sinder_jax.data import decode

    subjects, registers = open_models(checkpoint, args, antialias)
    config = subjects[0].model.config
    if not args.config:
        options = dataclasses.replace(options, image_size=config.img_size)
    options.chosen_blocks(config.depth)
    decode.check_side("the image size", options.image_size, config.patch_size)
    images = collect(args.images)
    photos = list(read_photos(images, options.image_size, config.patch_size))
    if images and not photos:
        raise ValueError(
            f"none of {len(images)} images can be read, such as {images[0]}"
        )
    if images:
        for note in lines.untold_statistics(subjects[0].model):
            cli.warn(f"{checkpoint}: {note}")
    return _Job(subjects, registers, photos, options, out)


def _analyze(job: _Job, names: Sequence[str], report: bool) -> dict[str, Any]:
    """Computes, draws and writes one analysis; prints its verdict."""
    from experiments.run.progress import duration
    from experiments.study import page, verdict
    from experiments.study.cache import Cache
    from experiments.study.numbers import Study
    from experiments.study.steps import Steps, compute
    from sinder_jax.storage import files

    began, out = time.monotonic(), job.out
    with Steps() as steps:
        cache = Cache(out / CACHE)
        study = Study(*job[:4], cache, steps.inside)
        compute(study, figures.plan(study, names), steps)
        drawn = []
        for one in figures.draw(study, names):
            steps.show(f"drawing {one.name}")
            write_figure(out, one)
            drawn.append(one)
        summary = verdict.summarize(study)
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        files.write(out / SUMMARY, text)
        if report:
            steps.show("writing the report")
            files.write(out / REPORT, page.render(summary, drawn))

    print(verdict.headline(summary))
    for name, paragraph in verdict.paragraphs(summary).items():
        print(f"{name}: {paragraph}")
    pages = f", {out / REPORT}" if report else ""
    noun = "figure" if len(drawn) == 1 else "figures"
    print(
        f"{len(drawn)} {noun} as PNG, PDF and NPZ, {SUMMARY}{pages} written to {out} "
        f"in {duration(time.monotonic() - began)}: {steps.computed} computed, "
        f"{steps.reused} found in {CACHE}/"
    )
    for subject in job.subjects:
        subject.model.forget()  # another may come
    return summary


def _parser() -> cli.Parser:
    listed = "\n".join(
        f"  {name:12} {kind.help}" for name, kind in figures.KINDS.items()
    )
    parser = cli.Parser(
        prog="python -m experiments.analyze",
        description="Draw every figure of the paper for a model, and report on it.",
        epilog=EXAMPLE.format(figures=listed),
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="file, or folder to search")
    add(
        "--checkpoint",
        action="append",
        metavar="DIR",
        help="model: a checkpoint, the workdir of a run, or a PyTorch file in any "
        "layout; given several times, a folder in --out for each and one table of all; "
        "default: the checkpoint of --config",
    )
    add("--compare", metavar="DIR", help="second model, such as the repaired one")
    add("--registers", metavar="DIR", help="model with registers, for the PCA figures")
    add(
        "--config",
        metavar="FILE",
        help="take detection, image size, directions and resampling from this config "
        "of a repair, such as giant.py, and from --config.KEY=VALUE; default: the "
        "authors' settings, and photographs of the size that the model was made for",
    )
    add(
        "--figures",
        default="all",
        metavar="NAMES",
        help="all, or names from the list below, with commas; default: %(default)s",
    )
    add("--report", action="store_true", help=f"also write {REPORT}")
    add("--out", default="analysis", metavar="DIR", help="default: %(default)s")
    add(
        "--gamma",
        default="2.0,1.5,1.3",
        metavar="X,Y",
        help="thresholds of clamped singular values; default: %(default)s",
    )
    add(
        "--blocks",
        metavar="I,J",
        help="blocks shown one by one, from 0; default: four, such as 9,19,29,39 of 40",
    )
    add("--overwrite", action="store_true", help="replace another model's analysis")
    return parser


# --- Arguments ------------------------------------------------------------------------


def _settings(
    args: Any, overrides: Sequence[str]
) -> "tuple[Options, bool | None, list[str]]":
    """Options of the study, how positions are resampled, and the checkpoints.

    Raises:
      ValueError: an option out of range, no checkpoint, or several and an option that
        goes with one.
    """
    from experiments import config as config_files
    from experiments.study.options import Options

    if overrides and not args.config:
        raise ValueError(f"unknown argument {overrides[0]} (see --help)")
    config = config_files.load(args.config or "giant.py")  # the authors' settings
    config_files.override(config, overrides)
    antialias = config.interpolate_antialias if args.config else None
    checkpoints = args.checkpoint or [x for x in [config.checkpoint] if x]
    if not checkpoints:
        raise ValueError("give the model to analyze: --checkpoint=DIR")
    if len(checkpoints) > 1 and (args.compare or args.registers):
        raise ValueError(
            f"got {len(checkpoints)} times --checkpoint: --compare and --registers go "
            "with one"
        )
    blocks = None
    if args.blocks is not None:
        blocks = tuple(sorted(set(_numbers("--blocks", args.blocks, int))))
    gammas = tuple(dict.fromkeys(_numbers("--gamma", args.gamma, float)))
    return Options.of(config, gammas=gammas, blocks=blocks), antialias, checkpoints


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"{name} must be {what} separated by commas, got {text!r}"
        ) from None


def open_models(
    checkpoint: str, args: Any, antialias: bool | None
) -> "tuple[list[Subject], Subject | None]":
    """The model, the model it is compared with, and the model with registers.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: not a model, or the models do not go together; says why.
    """
    from convert import open_model
    from experiments.study.numbers import Subject
    from sinder_jax.model import check_same_architecture

    given = {} if antialias is None else {"interpolate_antialias": antialias}
    name = "before" if args.compare else "model"
    subjects = [Subject(name, open_model(checkpoint, **given))]
    if args.compare:
        subjects.append(Subject("after", open_model(args.compare, **given)))
        check_same_architecture(subjects[0].model, subjects[1].model)
    if not args.registers:
        return subjects, None
    registers = Subject("with registers", open_model(args.registers))
    sizes = [each.model.config.patch_size for each in (subjects[0], registers)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{checkpoint} and {args.registers} have patches of different sizes: "
            f"{sizes[0]} and {sizes[1]} pixels"
        )
    return subjects, registers


def claim(out: Path, digest: str, *, overwrite: bool) -> None:
    """Makes the folder, or reuses a folder that holds this model's analysis.

    Args:
      out: the folder.
      digest: of the model.
      overwrite: True takes over whatever the folder holds.

    Raises:
      FileExistsError: it holds something else, and `overwrite` is False.
    """
    if out.exists() and not overwrite:
        try:
            kept = json.loads((out / SUMMARY).read_text())["models"][0]["digest"]
        except FileNotFoundError:
            # An analysis that was stopped before its end has a cache and no summary.
            is_ours = (out / CACHE).exists() or not any(out.iterdir())
            kept = digest if is_ours else None
        except (ValueError, KeyError, IndexError, TypeError):
            kept = None
        if kept != digest:
            what = "the analysis of another model" if kept else "something else"
            raise FileExistsError(
                f"{out} holds {what}: choose another --out or add --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)


# --- Files ----------------------------------------------------------------------------


def write_figure(out: Path, one: figures.Drawn) -> None:
    """Writes NAME.png, NAME.pdf and NAME.npz."""
    from experiments.study.cache import write_arrays
    from sinder_jax.plots import style
    from sinder_jax.storage import files

    for kind in ("png", "pdf"):
        files.write(out / f"{one.name}.{kind}", style.encode(one.figure, kind))
    # No slashes: an array's name is that of a member of the archive.
    arrays = {name.replace("/", "_"): array for name, array in one.arrays.items()}
    write_arrays(out / f"{one.name}.npz", arrays)


if __name__ == "__main__":
    launch.exit_on_error(main)
