"""The results of all models as JSON, as Markdown, as a plot and as lines.

Results --bootstrap, the same draws for all--> Rows: intervals, differences
Rows --write--> OUT/results.json, results.md, results.png     Rows --lines--> stdout
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.evaluation.job import Result, Scores
from experiments.evaluation.remedied import COSTS
from experiments.study.photos import unique_names
from sinder_jax import cli
from sinder_jax.evals import bootstrap
from sinder_jax.plots import score_plots, style
from sinder_jax.storage import files

JSON, TABLE, PLOT = "results.json", "results.md", "results.png"
PICTURES = "pictures"
UNDEFINED = "–"
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
        metrics: Scores = {}
        samples: dict[str, np.ndarray] = {}
        for prefix, part in result.parts().items():
            metrics |= {prefix + name: x for name, x in part.metrics().items()}
            drawn = _samples(config, part)
            samples |= {prefix + name: x for name, x in drawn.items()}
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


def _samples(config: ConfigDict, result: Result) -> dict[str, np.ndarray]:
    """Empty if the config wants none; NaN for one image: all its draws are alike."""
    if not config.resamples:
        return {}
    if result.counts.shape[1] == 1:
        return dict.fromkeys(result.metrics(), np.full(1, np.nan))
    return bootstrap.samples(
        result.counts, result.score, resamples=config.resamples, seed=config.seed
    )


def write(out: Path, found: Sequence[Row]) -> None:
    """Writes the three files, each whole or not at all."""
    told = json.dumps([as_json(row) for row in found], indent=2, ensure_ascii=False)
    files.write(out / JSON, told + "\n")
    files.write(out / TABLE, markdown(found))
    first = found[0].result
    folder = len(os.path.dirname(os.path.commonprefix([x.checkpoint for x in found])))
    points = {
        row.checkpoint[folder:].lstrip("/") or row.checkpoint: {
            name: (row.metrics[name], row.intervals.get(name))
            for name in first.headline
        }
        for row in found
    }
    if first.versus:
        figure = score_plots.versus(points, first.versus)
    else:
        figure = score_plots.scores(points, first.unit)
    files.write(out / PLOT, style.encode(figure, "png"))
    _write_pictures(out / PICTURES, found)


def _write_pictures(folder: Path, found: Sequence[Row]) -> None:
    """Writes MODEL_NAME.png for each picture of each model, MODEL_REMEDY_NAME.png."""
    paths = []
    for row in found:
        remedy = row.result.details.get("remedy", "")
        path = Path(row.checkpoint.removesuffix(f" + {remedy}"))
        end = f"_{remedy.replace(' ', '_')}" if remedy else ""
        paths.append(path.with_name(path.stem + end))
    names = unique_names(paths)
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
        "evaluated": {
            **row.result.evaluated,
            **{name: dict(x.evaluated) for name, x in row.result.also.items()},
        },
        **row.result.details,
    }


def lines(found: Sequence[Row]) -> list[str]:
    """A line for each model: its main metrics, and what was evaluated."""
    told = []
    for row in found:
        result = row.result
        others = list(columns(result))[len(result.headline) :]
        names = [*(result.versus[0] if result.versus else result.headline), *others]
        main = _listed(row, names, _with_interval)
        told.append(f"{row.checkpoint}: {main} ({_evaluated(result)})")
        if row.differences:
            main = _listed(row, [result.headline[0], *others], _difference)
            told.append(f"{row.checkpoint} - {found[0].checkpoint}: {main}")
    return told


def _listed(row: Row, names: Sequence[str], told: Callable[..., str]) -> str:
    units = columns(row.result)
    return ", ".join(f"{name} {told(row, name, units[name])}" for name in names)


def columns(result: Result) -> dict[str, str]:
    """Units by metric: of the headline, and of the main metric of other protocols."""
    others = {f"{name} {x.headline[0]}": x.unit for name, x in result.also.items()}
    return dict.fromkeys(result.headline, result.unit) | others


def markdown(found: Sequence[Row]) -> str:
    """The headline of all models as a table, and what was evaluated below it."""
    first = found[0]
    units = columns(first.result)
    names = [f"{name} ({unit})" if unit else name for name, unit in units.items()]
    costs = [_costs(row) for row in found]
    told = list(COSTS) if any(map(any, costs)) else []
    table = [["checkpoint", *names, *told]]
    table += [
        [row.checkpoint, *_cells(row, units, _with_interval), *cost[: len(told)]]
        for row, cost in zip(found, costs, strict=True)
    ]
    text = f"# {first.protocol}\n\n{_table(table)}\n"
    if len(found) > 1:
        table = [[f"minus {first.checkpoint}", *names]]
        table += [
            [row.checkpoint, *_cells(row, units, _difference)] for row in found[1:]
        ]
        text += f"\n{_table(table)}\n"
    if notes := _notes(first, text):
        text += f"\n{notes}"
    for row in found:
        text += f"\n\n{row.checkpoint} ({row.digest[:12]}): {_evaluated(row.result)}."
    if classes := first.result.details.get("iou"):
        table = [["IoU (%)", *(row.checkpoint for row in found)]]
        table += [
            [name, *(_percent(row.result.details["iou"][name]) for row in found)]
            for name in classes
        ]
        text += f"\n\n{_table(table)}"
    return text + "\n"


def _costs(row: Row) -> list[str]:
    """What the row's remedy or repair took, by column; empty where nothing tells it."""
    evaluated = row.result.evaluated
    return [
        next((f"{evaluated[key]:g}" for key in keys if key in evaluated), "")
        for keys in COSTS.values()
    ]


def _cells(
    row: Row, units: Mapping[str, str], told: Callable[..., str]
) -> Iterator[str]:
    return (told(row, name, unit, with_unit=False) for name, unit in units.items())


def _notes(first: Row, text: str) -> str:
    """How to read a text with tables."""
    notes, result = [], first.result
    if result.lower_is_better is not None:
        better = "Lower" if result.lower_is_better else "Higher"
        notes.append(f"{better} is better.")
    counts = [part.counts.shape[1] for part in result.parts().values()]
    if first.intervals and counts[0] == 1:
        notes.append(f"One image was evaluated: there is no interval ({UNDEFINED}).")
    if first.intervals and max(counts) > 1:
        seeds = result.counts.shape[0]
        images = "the images evaluated" + f" and {seeds} seeds" * (seeds > 1)
        notes.append(f"In brackets: 95 % intervals, bootstrap over {images}.")
    if UNDEFINED in text:
        told = f"{UNDEFINED}: undefined, for want of anything to divide by"
        told += "; as an interval, in some draws of images" * (max(counts) > 1)
        notes.append(f"{told}.")
    return " ".join(notes)


# --- Text -----------------------------------------------------------------------------


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _format(value: float, unit: str, sign: str = "") -> str:
    if not math.isfinite(value):
        return UNDEFINED
    digits = {"%": 2, "": 4}.get(unit, 3)
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no minus before 0.0000


def _percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.1f}"


def _with_interval(row: Row, name: str, unit: str, *, with_unit: bool = True) -> str:
    return _number_with(
        row.metrics[name], row.intervals.get(name), unit, unit * with_unit
    )


def _difference(row: Row, name: str, unit: str, *, with_unit: bool = True) -> str:
    words = "points" if unit == "%" else unit
    interval = row.difference_intervals.get(name)
    return _number_with(row.differences[name], interval, unit, words * with_unit, "+")


def _number_with(
    value: float, interval: Interval | None, unit: str, words: str, sign: str = ""
) -> str:
    shown = _format(value, unit, sign)
    if not math.isfinite(value):
        return shown
    shown += f" {words}" if words else ""
    if interval is not None:
        low, high = (_format(x, unit, sign) for x in interval)
        shown += f" [{low}, {high}]" if math.isfinite(sum(interval)) else f" [{low}]"
    return shown


def _evaluated(result: Result) -> str:
    own = ", ".join(f"{name}: {value}" for name, value in result.evaluated.items())
    others = [f"{name}: {_evaluated(x)}" for name, x in result.also.items()]
    return "; ".join([own, *others])


def _table(cells: Sequence[Sequence[str]]) -> str:
    rows = [[cli.shown(cell).replace("|", r"\|") for cell in row] for row in cells]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
