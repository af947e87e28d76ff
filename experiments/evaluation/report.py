"""The results of all models as JSON, as Markdown, as a plot and as lines.

Results --bootstrap, the same draws for all--> Rows: intervals, differences
Rows --write--> OUT/results.json, results.md, results.png     Rows --lines--> stdout
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.evaluation.job import Result, Scores
from experiments.study.photos import unique_names
from sinder_jax import cli
from sinder_jax.evals import bootstrap
from sinder_jax.plots import score_plots, style
from sinder_jax.storage import files

JSON, TABLE, PLOT = "results.json", "results.md", "results.png"
PICTURES = "pictures"
Interval = tuple[float, float]


class Row(NamedTuple):
    """What there is to tell of one model.

    Attributes:
      checkpoint: as it was given.
      digest: of the model's weights.
      protocol: its name.
      result: of the protocol.
      metrics: by name, in the paper's units.
      intervals: 95 % intervals of them; empty without a bootstrap.
      differences: of each metric to the first model's; empty for the first model.
      difference_intervals: of these.
    """

    checkpoint: str
    digest: str
    protocol: str
    result: Result
    metrics: Scores
    intervals: dict[str, Interval]
    differences: Scores
    difference_intervals: dict[str, Interval]


def rows(
    config: ConfigDict,
    checkpoints: Sequence[str],
    digests: Sequence[str],
    results: Sequence[Result],
) -> list[Row]:
    """Draws the bootstrap's samples and compares each model with the first."""
    found: list[Row] = []
    first_samples: dict[str, Any] = {}
    for checkpoint, digest, result in zip(checkpoints, digests, results, strict=True):
        metrics, samples = result.metrics(), {}
        if config.resamples:
            samples = bootstrap.samples(
                result.counts,
                result.score,
                resamples=config.resamples,
                seed=config.seed,
            )
        first = found[0].metrics if found else {}
        first_samples = first_samples or samples
        found.append(
            Row(
                checkpoint,
                digest,
                config.protocol,
                result,
                metrics,
                {name: bootstrap.interval(x) for name, x in samples.items()},
                {name: metrics[name] - value for name, value in first.items()},
                {
                    name: bootstrap.interval(samples[name] - first_samples[name])
                    for name in samples
                    if found
                },
            )
        )
    return found


def write(out: Path, found: Sequence[Row]) -> None:
    """Writes the three files, each whole or not at all."""
    told = json.dumps([as_json(row) for row in found], indent=2, ensure_ascii=False)
    files.write(out / JSON, told + "\n")
    files.write(out / TABLE, markdown(found))
    first = found[0].result
    points = {
        row.checkpoint: {
            name: (row.metrics[name], row.intervals.get(name))
            for name in first.headline
        }
        for row in found
    }
    if first.versus is None:
        figure = score_plots.scores(points, first.unit)
    else:
        figure = score_plots.versus(points, *first.versus)
    files.write(out / PLOT, style.encode(figure, "png"))
    _write_pictures(out / PICTURES, found)


def _write_pictures(folder: Path, found: Sequence[Row]) -> None:
    """Writes MODEL_NAME.png for each picture of each model."""
    names = unique_names([Path(row.checkpoint) for row in found])
    for model, row in zip(names, found, strict=True):
        for name, figure in row.result.figures.items():
            folder.mkdir(exist_ok=True)
            files.write(folder / f"{model}_{name}.png", style.encode(figure, "png"))


def as_json(row: Row) -> dict[str, Any]:
    """A row as JSON values; a metric that is not a number becomes null."""
    return {
        "checkpoint": row.checkpoint,
        "digest": row.digest,
        "protocol": row.protocol,
        "metrics": {name: _number(x) for name, x in row.metrics.items()},
        "intervals": {n: [_number(x) for x in i] for n, i in row.intervals.items()},
        "differences": {name: _number(x) for name, x in row.differences.items()},
        "difference_intervals": {
            n: [_number(x) for x in i] for n, i in row.difference_intervals.items()
        },
        "evaluated": dict(row.result.evaluated),
        **row.result.details,
    }


def lines(found: Sequence[Row]) -> list[str]:
    """A line for each model: its headline, and what was evaluated."""
    told = []
    for row in found:
        numbers = ", ".join(
            f"{name} {_with_interval(row, name)}" for name in row.result.headline
        )
        told.append(f"{row.checkpoint}: {numbers} ({_evaluated(row.result)})")
        if row.differences:
            main = row.result.headline[0]
            told.append(
                f"{row.checkpoint} - {found[0].checkpoint}: {main} "
                f"{_difference(row, main)}"
            )
    return told


def markdown(found: Sequence[Row]) -> str:
    """The headline of all models as a table, and what was evaluated below it."""
    first = found[0].result
    unit = f" ({first.unit})" if first.unit else ""
    names = [name + unit for name in first.headline]
    table = [["checkpoint", *names]]
    table += [
        [row.checkpoint, *(_with_interval(row, n, unit=False) for n in first.headline)]
        for row in found
    ]
    text = f"# {found[0].protocol}\n\n{_table(table)}\n"
    if len(found) > 1:
        table = [[f"minus {found[0].checkpoint}", *names]]
        table += [
            [row.checkpoint, *(_difference(row, n, unit=False) for n in first.headline)]
            for row in found[1:]
        ]
        text += f"\n{_table(table)}\n"
    if first.lower_is_better is not None:
        better = "Lower" if first.lower_is_better else "Higher"
        text += f"\n{better} is better. "
    else:
        text += "\n"
    if found[0].intervals:
        text += "In brackets: 95 % intervals, bootstrap over the images evaluated"
        seeds = first.counts.shape[0]
        text += f" and {seeds} seeds." if seeds > 1 else "."
    text = text.rstrip(" ")
    for row in found:
        text += f"\n\n{row.checkpoint} ({row.digest[:12]}): {_evaluated(row.result)}."
    if classes := first.details.get("iou"):
        table = [["IoU (%)", *(row.checkpoint for row in found)]]
        table += [
            [name, *(_percent(row.result.details["iou"][name]) for row in found)]
            for name in classes
        ]
        text += f"\n\n{_table(table)}"
    return text + "\n"


# --- Text -----------------------------------------------------------------------------


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _format(value: float, unit: str, sign: str = "") -> str:
    digits = {"%": 2, "": 4}.get(unit, 3)
    return f"{value:{sign}.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _with_interval(row: Row, name: str, *, unit: bool = True) -> str:
    kind = row.result.unit
    shown = _format(row.metrics[name], kind) + f" {kind}" * (unit and kind != "")
    if name in row.intervals:
        low, high = (_format(x, kind) for x in row.intervals[name])
        shown += f" [{low}, {high}]"
    return shown


def _difference(row: Row, name: str, *, unit: bool = True) -> str:
    kind = row.result.unit
    words = "points" if kind == "%" else kind
    shown = _format(row.differences[name], kind, "+")
    shown += f" {words}" * (unit and kind != "")
    if name in row.difference_intervals:
        low, high = (_format(x, kind, "+") for x in row.difference_intervals[name])
        shown += f" [{low}, {high}]"
    return shown


def _evaluated(result: Result) -> str:
    return ", ".join(f"{name}: {value}" for name, value in result.evaluated.items())


def _table(cells: Sequence[Sequence[str]]) -> str:
    rows = [[cli.shown(cell).replace("|", r"\|") for cell in row] for row in cells]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
