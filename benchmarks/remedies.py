r"""The table of README's "Which remedy?": remedies of planted defects, by the meter.

    python -m benchmarks.remedies --out=DIR --data=FOLDER [--seeds=12] [--gamma=4]
    python -m benchmarks.remedies --out=DIR --data=FOLDER --runs=DIR --truth=MODEL \
        --seeds=5 [--config.KEY=VALUE ...]

Without --runs: the demo's planted models, each repaired as the demo does. With it: what
`planted_real` has left there, and the model before planting. Each seed is evaluated by
`experiments.evaluate --config=artifacts.py` on the photographs in --data, which no
remedy reads. Prints the mean over the seeds of each number, with the smallest and the
largest; overrides are those of artifacts.py.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
from experiments import evaluate, repair
from experiments.evaluation.remedied import COSTS
from experiments.run import inputs
from sinder_jax import launch, planted

APPLIED = "ablation,data-free,test-time registers"
SINDER = "SINDER"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates every seed, and prints the table when all are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for repairs and evaluations")
    add("--data", required=True, help="photographs to measure on")
    add("--runs", type=Path, help="what benchmarks.planted_real wrote")
    add("--truth", help="with --runs: the model before planting")
    add("--seeds", type=int, default=12)
    add(
        "--gamma",
        type=float,
        help="of clamping; with --runs as each run's summary says",
    )
    args, overrides = parser.parse_known_args(argv)
    if bool(args.runs) != bool(args.truth):
        parser.error("--runs and --truth go together")
    args.out.mkdir(parents=True, exist_ok=True)
    told = []
    for seed in range(args.seeds):
        run = args.runs / f"seed{seed}" if args.runs else _demo(args.out, seed)
        told.append(evaluated(args, run, args.out / f"meter{seed}", overrides))
    print(table(told))
    return 0


def _demo(out: Path, seed: int) -> Path:
    """The workdir of the demo's repair of another planted model, with its truth."""
    run = out / f"seed{seed}"
    repair.main(["--config=tiny.py", f"--workdir={run}", f"--config.seed={seed}"])
    truth = run / "truth.safetensors"
    if not truth.exists():
        made = planted.planted_model(seed)
        params = jax.tree.map(np.array, made.params)
        params["blocks"]["mlp"]["w3"]["kernel"][made.block][made.unit] = 0.0
        inputs.write_planted(truth, made._replace(params=params))
    return run


def evaluated(
    args: argparse.Namespace, run: Path, workdir: Path, overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The meter's numbers of one planted model, by remedy."""
    planted_file = run / "planted.safetensors"
    remedies, gamma = APPLIED, args.gamma
    if args.runs and gamma is None:
        summary = json.loads((run / "summary.json").read_text())
        gamma = summary["against_truth"]["clamped_at"]
    if gamma is not None:
        remedies += ",clamping"
    side = convert.open_model(planted_file).config.img_size
    settings = {
        "data": args.data,
        "truth": args.truth or str(run / "truth.safetensors"),
        "image_size": side,
        "remedies": remedies,
        "gamma": gamma or 0.0,
        "remedy_data": "sample",
        "remedy_images": 4,
    }
    command = ["--config=artifacts.py", f"--workdir={workdir}"]
    command += [f"--checkpoint={path}" for path in (planted_file, run)]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    evaluate.main([*command, *overrides])
    found = {}
    for row in json.loads((workdir / "results.json").read_text()):
        name = row["checkpoint"].removeprefix(f"{planted_file} + ")
        name = {str(planted_file): "nothing", str(run): SINDER}.get(name, name)
        costs = {
            cost: sum(row["evaluated"].get(key, 0) for key in keys)
            for cost, keys in COSTS.items()
        }
        found[name] = row["metrics"] | costs
    return found


def table(told: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown: the mean over seeds of each number, its smallest and its largest."""
    numbers: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in told:
        for remedy, metrics in seed.items():
            for name, value in metrics.items():
                numbers[name][remedy].append(np.nan if value is None else value)
    names = list(numbers)
    lines = [["remedy", *names], ["---"] * (1 + len(names))]
    for remedy in told[0]:
        cells = [_cell(numbers[name][remedy]) for name in names]
        lines.append([remedy, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: Sequence[float]) -> str:
    """The mean, and the range unless it is the same at this precision."""
    if np.isnan(values).any():
        return "–"
    each = float(np.mean(values)), min(values), max(values)
    mean, low, high = map(_short, each)
    return mean if low == high else f"{mean} ({low} to {high})"


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{round(value, 4):g}"


if __name__ == "__main__":
    launch.exit_on_error(main)
