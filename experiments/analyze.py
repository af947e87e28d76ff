"""Every figure of the paper for any model, the numbers behind them, and a report.

    checkpoint, images --steps, kept in OUT/cache--> numbers
    numbers --> OUT/NAME.png, NAME.pdf, NAME.npz, analysis.json and report.html

With --compare, a second model such as the repaired model is compared with the first,
whose directions are the yardstick for both. A second run with the same --out computes
only what is new.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study import figures
from sinder_jax import cli, launch

if TYPE_CHECKING:  # JAX takes seconds to import, which --help need not wait for
    from experiments.study.numbers import Subject
    from experiments.study.options import Options

EXAMPLE = """\
examples:
  python -m experiments.analyze --checkpoint=vitg14 --compare=run/repaired \\
      villa.png photos/ --report --out=analysis
  python -m experiments.analyze --checkpoint=vitg14 --figures=forecast,spectra

figures:
{figures}

SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""
SUMMARY, REPORT, CACHE = "analysis.json", "report.html", "cache"


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
    began = time.monotonic()
    args, overrides = _parser().parse_known_args(argv)

    from experiments.run.progress import duration
    from experiments.study import page, verdict
    from experiments.study.cache import Cache
    from experiments.study.numbers import Study
    from experiments.study.photos import collect, read_photos
    from experiments.study.steps import Steps, compute
    from sinder_jax.data import decode
    from sinder_jax.storage import files

    launch.start_jax()
    # First everything that can be checked before the long part begins.
    options, antialias, checkpoint = _settings(args, overrides)
    names = figures.check_names(
        args.figures.split(","), photos=bool(args.images), compare=bool(args.compare)
    )
    subjects, registers = open_models(checkpoint, args, antialias)
    config = subjects[0].model.config
    options.chosen_blocks(config.depth)
    decode.check_side("the image size", options.image_size, config.patch_size)
    images = collect(args.images)
    photos = list(read_photos(images, options.image_size, config.patch_size))
    if images and not photos:
        raise ValueError(
            f"none of {len(images)} images can be read, such as {images[0]}"
        )
    out = Path(args.out)
    claim(out, subjects[0].model.digest, overwrite=args.overwrite)

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
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        files.write(out / SUMMARY, text)
        if args.report:
            steps.show("writing the report")
            files.write(out / REPORT, page.render(summary, drawn))

    print(verdict.headline(summary))
    for name, paragraph in verdict.paragraphs(summary).items():
        print(f"{name}: {paragraph}")
    report = f", {out / REPORT}" if args.report else ""
    noun = "figure" if len(drawn) == 1 else "figures"
    print(
        f"{len(drawn)} {noun} as PNG, PDF and NPZ, {SUMMARY}{report} written to {out} "
        f"in {duration(time.monotonic() - began)}: {steps.computed} computed, "
        f"{steps.reused} found in {CACHE}/"
    )
    return 0


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
        metavar="DIR",
        help="model: a checkpoint, the workdir of a run, or a PyTorch file in any "
        "layout; default: the checkpoint of --config",
    )
    add("--compare", metavar="DIR", help="second model, such as the repaired one")
    add("--registers", metavar="DIR", help="model with registers, for the PCA figures")
    add(
        "--config",
        metavar="FILE",
        help="take detection, image size, directions and resampling from this config "
        "of a repair, such as giant.py, and from --config.KEY=VALUE; default: the "
        "authors' settings",
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
) -> "tuple[Options, bool | None, str]":
    """Options of the study, how positions are resampled, and the checkpoint.

    Raises:
      ValueError: an option out of range, or no checkpoint.
    """
    from experiments import config as config_files
    from experiments.study.options import Options

    if overrides and not args.config:
        raise ValueError(f"unknown argument {overrides[0]} (see --help)")
    config = config_files.load(args.config or "giant.py")  # the authors' settings
    config_files.override(config, overrides)
    antialias = config.interpolate_antialias if args.config else None
    checkpoint = args.checkpoint or config.checkpoint
    if not checkpoint:
        raise ValueError("give the model to analyze: --checkpoint=DIR")
    blocks = None
    if args.blocks is not None:
        blocks = tuple(sorted(set(_numbers("--blocks", args.blocks, int))))
    gammas = tuple(dict.fromkeys(_numbers("--gamma", args.gamma, float)))
    return Options.of(config, gammas=gammas, blocks=blocks), antialias, checkpoint


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
