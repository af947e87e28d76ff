r"""How many photographs a repair needs, from the original and from a data-free start.

    python -m benchmarks.hybrid [--seeds=12] [--images=64] [--out=FILE]
    python -m benchmarks.hybrid --runs=DIR --truth=MODEL --seeds=5 --images=256

Without --runs on the demo's planted models; with it on those that `planted_real` has
left in DIR. Each is repaired by SINDER from three starts: as planted; repaired without
data, which makes the hybrid; and with half the changes of that repair, as if it had
fallen short. After 0, 1, 2, 3, 4, 6, 8, 12, … photographs, crops of six, it is measured
on crops of the two that are held out.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import convert
from experiments.configs import planted_small, tiny
from experiments.run import inputs, results
from sinder_jax import datafree, defects, factor, families, launch, planted, repair
from sinder_jax.analysis import artifacts, forecast
from sinder_jax.analysis.tokens import last_patches
from sinder_jax.data import decode
from sinder_jax.data.listing import Photograph
from sinder_jax.model import Model

TENTH = 0.1  # of the defective patches: what a repair has to reach
SHARES = {"data-free": 1.0, "half of it": 0.5}
MEASURED = 8  # photographs held out
COUNTS = {factor * 2**power for factor in (1, 3) for power in range(16)}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a row for each seed, start and number of photographs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--runs", type=Path, help="what benchmarks.planted_real wrote")
    add("--seeds", type=int, default=12)
    add("--images", type=int, default=64, help="most photographs to repair on")
    add("--out", type=Path, help="JSON file for all numbers")
    add("--truth", help="with --runs: the model before planting")
    args = parser.parse_args(argv)
    if bool(args.runs) != bool(args.truth):
        parser.error("--runs and --truth go together")
    config = (planted_small if args.runs else tiny).get_config()
    config.data, config.num_images = "sample:crops", 400
    train, held_out = inputs.photographs(config)
    images = _read(config, train[: args.images])
    seen = _read(config, results.spread(held_out, MEASURED))
    print("| seed | start | photographs | defective | sound | thrown | s |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for seed in range(args.seeds):
        model, truth = _models(args, seed)
        measure = Measure(model, truth, seen)
        for row in curves(config, model, images, measure):
            rows.append({"seed": seed, **row})
            print(
                f"| {seed} | {row['start']} | {row['photographs']} | "
                f"{row['defective']:.2f} | {row['sound']:.4f} | {row['thrown']:.4f} | "
                f"{row['seconds']:.1f} |",
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1))
    print(json.dumps(needed(rows), indent=1))
    return 0


def needed(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, int | None]]:
    """By start and seed: the photographs after which at most a tenth stays defective.

    That is from there on for all later measurements; None if it is never so.
    """
    found: dict[str, dict[int, int | None]] = {}
    before = {
        row["seed"]: row["defective"]
        for row in rows
        if row["start"] == "planted" and not row["photographs"]
    }
    for row in rows:
        each = found.setdefault(row["start"], {})
        if row["defective"] > TENTH * before[row["seed"]]:
            each[row["seed"]] = None
        elif each.get(row["seed"]) is None:
            each[row["seed"]] = row["photographs"]
    return found


def curves(
    config: ConfigDict,
    model: Model,
    images: Sequence[np.ndarray],
    measure: "Measure",
) -> Iterator[dict[str, Any]]:
    """What is left of the defect after each number of photographs, for every start."""
    found = defects.singular_defects(model.config, model.params)
    block = forecast.forecast(model.config, model.params, found=found).block
    options = dataclasses.replace(inputs.repair_options(config), first_block=block)
    step = repair.make_step(model.config, options)
    starts = {"planted": (model.params, 0.0)}
    began = time.monotonic()
    made = datafree.repair(model.config, model.params, found=found)
    took = time.monotonic() - began
    for name, share in SHARES.items():
        eps = {kernel: share * each for kernel, each in made.eps.items()}
        starts[name] = factor.merge(model.params, made.factors, eps), took
    for name, (params, seconds) in starts.items():
        frozen, state = repair.init(model.config, params, options)
        yield {"start": name, "photographs": 0, **measure(params), "seconds": seconds}
        began = time.monotonic()
        for done, image in enumerate(images, 1):
            state, _ = step(state, frozen, image[None])
            if done in COUNTS or done == len(images):
                jax.block_until_ready(state)
                took = seconds + time.monotonic() - began
                told = measure(repair.merged_params(frozen, state))
                yield {"start": name, "photographs": done, **told, "seconds": took}


class Measure:
    """Defective patches a photograph, and cosines with the model before planting."""

    def __init__(self, model: Model, truth: Model, images: Sequence[np.ndarray]):
        self.config, self.images = model.config, images
        found = defects.singular_defects(model.config, model.params)
        self.direction = found.directions[-1].astype(np.float32)
        self.before, self.truth = self._tokens(model.params), self._tokens(truth.params)

    def __call__(self, params: Any) -> dict[str, float]:
        each = [
            artifacts.sums(now, before, self.direction, truth)
            for now, before, truth in zip(
                self._tokens(params), self.before, self.truth, strict=True
            )
        ]
        total = artifacts.Sums(*np.sum(each, axis=0))
        return {
            "defective": float(total.large) / len(each),
            "sound": float(total.true_sound / total.sound),
            "thrown": float(total.true_thrown / total.thrown),
        }

    def _tokens(self, params: Any) -> list[np.ndarray]:
        return [np.asarray(last_patches(self.config, params, x)) for x in self.images]


def _read(config: ConfigDict, photographs: Sequence[Photograph]) -> list[np.ndarray]:
    model = inputs.architecture(config)
    statistics = families.of(model).statistics

    def read(photograph: Photograph) -> np.ndarray:
        crop = decode.training_crop(
            photograph.read(), config.image_size, patch_size=model.patch_size
        )
        return decode.normalize(crop, statistics)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, photographs))


def _models(args: argparse.Namespace, seed: int) -> tuple[Model, Model]:
    """A planted model, and the truth: the same before planting, or without the unit."""
    if args.runs:
        file = args.runs / f"seed{seed}" / "planted.safetensors"
        return convert.open_model(file), convert.open_model(args.truth)
    made = planted.planted_model(seed)
    truth = jax.tree.map(np.array, made.params)
    truth["blocks"]["mlp"]["w3"]["kernel"][made.block][made.unit] = 0.0
    return Model.of(made.config, made.params), Model.of(made.config, truth)


if __name__ == "__main__":
    launch.exit_on_error(main)
