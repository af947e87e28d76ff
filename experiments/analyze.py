"""Every figure of the paper for any model, the numbers behind them, and a report.

    checkpoint, images --steps, kept in OUT/cache--> numbers
    numbers --> OUT/NAME.png, NAME.pdf, NAME.npz, analysis.json and report.html

With --compare, a second model such as the repaired one is held against the first, whose
directions are the yardstick for both. A second run with the same --out computes only
what it has not computed before.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinder_jax import cli

if TYPE_CHECKING:  # JAX takes seconds to import, which --help need not wait for
    from experiments.study.subjects import Options, Photo, Subject
    from experiments.study.token_figures import Drawn

EXAMPLE = """\
examples:
  python -m experiments.analyze --checkpoint=vitg14 --compare=run/repaired \\
      villa.png photos/ --report --out=analysis
  python -m experiments.analyze --checkpoint=vitg14 --figures=forecast,spectra

figures:
{figures}

SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""
FIGURES = (
    # name, what it shows: as `figures.KINDS`, which would load JAX
    ("pca", "PCA of tokens, with --compare and --registers side by side (figs. 1, 3)"),
    ("norms", "norms of the patch tokens by block (fig. 2)"),
    ("angles", "angles between ν_i and the patch tokens by block (fig. 2d)"),
    ("random", "angles to a random direction (fig. 8)"),
    ("theory", "measured direction of the defective tokens against ν_i (fig. 2)"),
    ("blocks", "PCA, angles, detection, learning targets of some blocks (fig. 6)"),
    ("growth", "what attention and FFN of each block add along ν"),
    ("clamp", "PCA and norms with clamped singular values (fig. 5)"),
    ("forecast", "defect forecast; needs no image"),
    ("spectra", "singular values and eigenvalues by block; needs no image"),
    ("eigenvalues", "eigenvalues in the complex plane; needs no image"),
    ("changes", "learned minus original singular values; needs --compare (fig. 7)"),
)
SUMMARY, REPORT, CACHE = "analysis.json", "report.html", "cache"


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and writes.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code: 0.

    Raises:
      ValueError, OSError, ImportError, FloatingPointError: what `cli.exit_on_error`
        shows the user.
    """
    began = time.monotonic()
    args, overrides = _parser().parse_known_args(argv)

    from experiments.study import figures, verdict
    from experiments.study.cache import Cache
    from experiments.study.steps import Steps, compute
    from experiments.study.study import Study

    # First whatever can be told to be wrong before the long part begins.
    options, antialias, checkpoint = _settings(args, overrides)
    names = figures.check_names(
        args.figures.split(","), photos=bool(args.images), compare=bool(args.compare)
    )
    subjects, registers = open_models(checkpoint, args, antialias)
    check_blocks(options.blocks, subjects[0].config.depth)
    photos = read_images(args.images, options, subjects[0])
    out = Path(args.out)
    claim(out, subjects[0], overwrite=args.overwrite)

    with Steps() as steps:
        cache = Cache(out / CACHE)
        study = Study(subjects, registers, photos, options, cache, steps.inside)
        compute(study, figures.plan(study, names), steps)
        drawn = []
        for one in figures.draw(study, names):
            steps.show(f"drawing {one.name}")
            write_figure(out, one)
            drawn.append(one)
        summary = verdict.summarize(study)
        write(out / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        if args.report:
            steps.show("writing the report")
            write(out / REPORT, make_report(summary, drawn))

    from experiments.run.progress import duration

    print(verdict.headline(summary))
    report = f", {out / REPORT}" if args.report else ""
    print(
        f"{len(drawn)} figures as PNG, PDF and NPZ, {SUMMARY}{report} written to {out} "
        f"in {duration(time.monotonic() - began)}: {steps.computed} computed, "
        f"{steps.reused} found in {CACHE}/"
    )
    return 0


def _parser() -> cli.Parser:
    listed = "\n".join(f"  {name:12} {what}" for name, what in FIGURES)
    parser = cli.Parser(
        prog="python -m experiments.analyze",
        description="Draw every figure of the paper for a model, and report on it.",
        epilog=EXAMPLE.format(figures=listed),
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="file, or folder to search")
    add(
        "--checkpoint",
        metavar="DIR",
        help="model: a checkpoint of ours or a PyTorch file in any layout; default: "
        "the one that --config names",
    )
    add("--compare", metavar="DIR", help="second model, such as the repaired one")
    add("--registers", metavar="DIR", help="model with registers, for the PCA figures")
    add(
        "--config",
        metavar="FILE",
        help="a config of a repair, such as giant.py: detection, image size, "
        "directions and resampling as there, changed by --config.KEY=VALUE; default: "
        "the authors' settings",
    )
    add(
        "--figures",
        default="all",
        metavar="NAMES",
        help="all, or some of those below with commas between; default: %(default)s",
    )
    add("--report", action="store_true", help=f"also write {REPORT}: one file, for all")
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


# --- What is asked for ----------------------------------------------------------------


def _settings(
    args: Any, overrides: Sequence[str]
) -> "tuple[Options, bool | None, str]":
    """Options of the study, how positions are resampled, and the checkpoint.

    Raises:
      ValueError: an option out of range, or no checkpoint.
    """
    from experiments import config as config_files
    from experiments.study.subjects import Options
    from sinder_jax import defects, loss

    told: dict[str, Any] = {}
    antialias, checkpoint = None, args.checkpoint
    if args.config:
        config = config_files.load(args.config)
        config_files.override(config, overrides)
        names = [field.name for field in dataclasses.fields(Options)]
        told = {name: config[name] for name in names if name in config}
        antialias = config.interpolate_antialias
        checkpoint = checkpoint or config.checkpoint
    elif overrides:
        raise ValueError(f"unknown argument {overrides[0]} (see --help)")
    if not checkpoint:
        raise ValueError("give the model to analyze: --checkpoint=DIR")
    blocks = None
    if args.blocks is not None:
        blocks = tuple(sorted(set(_numbers("--blocks", args.blocks, int))))
    gammas = tuple(dict.fromkeys(_numbers("--gamma", args.gamma, float)))
    for gamma in gammas:
        if not 0 < gamma < float("inf"):
            raise ValueError(f"--gamma must be above 0, got {gamma:g}")
    options = Options(**told, gammas=gammas, blocks=blocks)
    loss.check_loss_options(
        mask_thr=options.mask_thr, window=options.window, temperature=1.0
    )
    if options.method not in defects.METHODS:
        raise ValueError(
            f"method must be one of {defects.METHODS}, got {options.method!r}."
        )
    return options, antialias, checkpoint


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"{name} must be {what} with commas between, got {text!r}"
        ) from None


def open_models(
    checkpoint: str, args: Any, antialias: bool | None
) -> "tuple[list[Subject], Subject | None]":
    """The model, the one it is compared with, and the one with registers.

    Raises:
      FileNotFoundError: one is not there.
      ValueError: one is no model, or they do not go together; says in what.
    """
    from experiments.study.subjects import Subject, check_same_architecture

    name = "before" if args.compare else "model"
    subjects = [Subject(name, checkpoint, antialias)]
    if args.compare:
        subjects.append(Subject("after", args.compare, antialias))
        check_same_architecture(*subjects)
    registers = None
    if args.registers:
        registers = Subject("with registers", args.registers)
        sizes = [each.config.patch_size for each in (subjects[0], registers)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{checkpoint} and {args.registers} have patches of different sizes: "
                f"{sizes[0]} and {sizes[1]} pixels"
            )
    return subjects, registers


def check_blocks(blocks: Sequence[int] | None, depth: int) -> None:
    """Raises ValueError that names a block which does not exist."""
    for block in blocks or ():
        if not 0 <= block < depth:
            raise ValueError(
                f"there is no block {block}: the model has blocks 0 to {depth - 1}"
            )


def read_images(
    images: Sequence[str], options: "Options", subject: "Subject"
) -> "list[Photo]":
    """The photographs of files and folders; unreadable ones are named and skipped.

    Raises:
      FileNotFoundError: something given does not exist.
      ValueError: there is no image in a folder, or none that can be read.
    """
    from experiments.study.subjects import read_photos
    from experiments.visualize import collect

    def skipped(reason: str) -> None:
        print(f"skipped, unreadable: {reason}", file=sys.stderr, flush=True)

    size, patch_size = options.image_size, subject.config.patch_size
    return read_photos(collect(images), size, patch_size, skipped)


def claim(out: Path, subject: "Subject", *, overwrite: bool) -> None:
    """Makes the folder, or goes on in one that holds this model's analysis.

    Raises:
      FileExistsError: it holds something else, and `overwrite` is False.
    """
    summary = out / SUMMARY
    if out.exists() and not overwrite:
        try:
            kept = json.loads(summary.read_text())["models"][0]["digest"]
        except FileNotFoundError:
            # An analysis that was stopped before its end has a cache and no summary.
            kept = subject.digest if (out / CACHE).exists() else None
            if kept is None and not any(out.iterdir()):
                kept = subject.digest
        except (ValueError, KeyError, IndexError, TypeError):
            kept = None
        if kept != subject.digest:
            what = "the analysis of another model" if kept else "something else"
            raise FileExistsError(
                f"{out} holds {what}: choose another --out or add --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)


# --- What is done ---------------------------------------------------------------------


def write_figure(out: Path, one: "Drawn") -> None:
    """Writes NAME.png, NAME.pdf and NAME.npz."""
    from experiments.study.cache import write_arrays
    from sinder_jax.plots import style

    for kind in ("png", "pdf"):
        write(out / f"{one.name}.{kind}", style.encode(one.figure, kind))
    # No slashes: an array's name is that of a member of the archive.
    arrays = {name.replace("/", "_"): array for name, array in one.arrays.items()}
    write_arrays(out / f"{one.name}.npz", arrays)


def make_report(summary: dict[str, Any], drawn: "Sequence[Drawn]") -> str:
    """The text of report.html."""
    from experiments.study import report
    from sinder_jax.plots import style

    return report.page(
        summary,
        [
            report.Inlined(
                one.name,
                one.title,
                one.caption,
                style.encode(one.figure, "svg"),
                float(one.figure.get_size_inches()[0]),
            )
            for one in drawn
        ],
    )


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all."""
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        data = content.encode() if isinstance(content, str) else content
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.exit_on_error(main)
