"""The benchmark suite: every number with a baseline from the same run.

    python -m benchmarks.run [NAME ...] [--out=FOLDER] [--rounds=5] [--quick]

Names: repair, depth, images, directions, factorize, datafree, memory, features, linear,
convert, decode, class_tokens, knn, crf, cause, stego; without a name all of them run.
Prints Markdown tables; --out also writes them to a folder, with all numbers as JSON.
--quick uses small models, to check that everything runs. Competitors are timed in turn,
A B A B …, and compared by their medians.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode, evals, memory, operations, process, synthetic
from benchmarks.timing import Numbers, in_turn, summary
from sinder_jax import datafree, defects, factor, kernels, repair, vit

PACKAGES = ("jax", "flax", "numpy", "orbax-checkpoint", "torch")


class Case:
    """A repair with its first defect in a given block, for us and for the baseline.

    Args:
      config: the architecture.
      size: side of the image in pixels.
      block: block of the defect, from 0.
    """

    def __init__(self, config: vit.ViTConfig, size: int, block: int):
        self.model = synthetic.synthetic_model(config)
        rng = np.random.default_rng(1)
        self.image = rng.standard_normal((size, size, 3)).astype(np.float32)
        self.options = repair.RepairOptions()
        self.directions = synthetic.defect_directions(
            config, self.model.params, self.image, block
        )
        self.losses: dict[str, list[float]] = {}

    def ours(self, images: int = 1) -> Callable[[], None]:
        """A function that takes one of our steps, compiled in advance."""
        model = self.model
        frozen, state = repair.init(
            model.config, model.params, self.options, self.directions, model.factors
        )
        batch = jnp.asarray(np.repeat(self.image[None], images, axis=0))
        step = repair.make_step(model.config, self.options)
        start = time.perf_counter()
        compiled = step.lower(state, frozen, batch).compile()
        self.compile_seconds = time.perf_counter() - start

        def call() -> None:
            nonlocal state
            state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
            self.losses.setdefault("ours", []).append(float(metrics.loss[0]))

        return call

    def baseline(self, rebuild: str) -> Callable[[], None]:
        """A function that takes one of the authors' steps in PyTorch."""
        from benchmarks import torch_baseline

        torch_baseline.set_device(jax.default_backend() == "cpu")
        torch_baseline.set_precision("highest")
        model = self.model
        baseline = torch_baseline.Baseline(
            model.config,
            model.params,
            model.factors,
            model.qk,
            self.directions,
            self.options,
            getattr(torch_baseline, f"rebuild_{rebuild}"),
        )

        def call() -> None:
            result = baseline.step(self.image)
            torch_baseline.wait()
            self.losses.setdefault(rebuild, []).append(result.loss)

        return call


def giant_width(depth: int, quick: bool) -> tuple[vit.ViTConfig, int]:
    """Architecture and image side: as wide as the giant, or small."""
    if quick:
        return vit.ViTConfig(128, depth, 2, "swiglu", img_size=112), 112
    config = vit.ViTConfig(1536, depth, 24, "swiglu", interpolate_antialias=True)
    return config, 518


def bench_repair(rounds: int, quick: bool) -> Numbers:
    """Compares a repair step with the authors': one image, defect in the last block."""
    config, size = giant_width(16, quick)
    case = Case(config, size, config.depth - 1)
    calls = {"baseline": case.baseline("dense"), "ours": case.ours()}
    numbers = summary(in_turn(rounds, **calls), "baseline")
    both = zip(case.losses["ours"], case.losses["dense"], strict=True)
    numbers["largest relative difference of the losses"] = max(
        abs(ours - theirs) / theirs for ours, theirs in both
    )
    numbers["first losses"] = {name: x[0] for name, x in case.losses.items()}
    numbers["compile seconds"] = case.compile_seconds
    numbers["peak GiB of both"] = process.peak_bytes() / 2**30
    del calls
    cheap = in_turn(1, cheap=case.baseline("scaled"))["cheap"][0]
    numbers["seconds"]["baseline, (U·s)·Vᵀ"] = cheap
    tokens = 1 + (size // config.patch_size) ** 2
    numbers["GFLOP"] = {
        "ours": operations.our_step(config, tokens, config.depth - 1).total,
        "baseline": operations.authors_step(config, tokens, config.depth - 1),
    }
    return numbers


def bench_images(rounds: int, quick: bool) -> Numbers:
    """Compares steps of one, two and four images, which share the merging."""
    config, size = giant_width(12, quick)
    case = Case(config, size, config.depth - 1)
    seconds = {}
    for images in (1, 2, 4):
        seconds[f"{images} images"] = in_turn(rounds, call=case.ours(images))["call"]
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    per_image = {name: x / int(name.split()[0]) for name, x in medians.items()}
    return {"seconds": medians, "seconds an image": per_image}


def bench_directions(rounds: int, quick: bool) -> Numbers:
    """Times the analytic directions, and the authors' Monte-Carlo way on two blocks."""
    config = vit.CONFIGS["dinov2_vits14" if quick else "dinov2_vitg14"]
    params = synthetic.random_params(config)
    probes = 2_000 if quick else 100_000
    start = time.perf_counter()
    defects.singular_defects(config, params)
    analytic = time.perf_counter() - start
    start = time.perf_counter()
    for block in range(2):
        defects.block_map(
            config,
            params,
            block,
            "monte_carlo",
            key=jax.random.key(0),
            num_probes=probes,
        )
    monte_carlo = (time.perf_counter() - start) / 2 * config.depth
    return {
        "seconds": {"analytic": analytic, "monte_carlo, from 2 blocks": monte_carlo},
        "times faster": monte_carlo / analytic,
    }


def bench_factorize(rounds: int, quick: bool) -> Numbers:
    """Compares the factors of two blocks with float64 SVDs, one after the other."""
    name = "dinov2_vits14" if quick else "dinov2_vitg14"
    config = dataclasses.replace(vit.CONFIGS[name], depth=2)
    params = synthetic.random_params(config)
    _, stacks = kernels.split(config, params)

    def svds() -> None:
        for kernel in (kernel for stack in stacks.values() for kernel in stack):
            np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)

    seconds = in_turn(rounds, SVDs=svds, ours=lambda: factor.factorize(config, params))
    numbers = summary(seconds, "SVDs")
    blocks = vit.CONFIGS[name].depth
    numbers["seconds of all blocks"] = {
        name: x / config.depth * blocks for name, x in numbers["seconds"].items()
    }
    return numbers


def bench_datafree(rounds: int, quick: bool) -> Numbers:
    """Times a repair from the weights alone beside the directions that it begins with.

    A random giant whose middle block throws tokens; once, as it takes minutes.
    """
    del rounds
    config = vit.CONFIGS["dinov2_vits14" if quick else "dinov2_vitg14"]
    params = synthetic.random_params(config)
    synthetic.plant_unit(config, params, config.depth // 2)
    start = time.perf_counter()
    found = defects.singular_defects(config, params)
    between = time.perf_counter()
    repaired = datafree.repair(config, params, found=found)
    return {
        "seconds": {
            "directions": between - start,
            "repair": time.perf_counter() - between,
        },
        "blocks changed": ", ".join(map(str, repaired.blocks)),
        "largest gap before": float(repaired.gaps_before.max()),
        "largest gap after": float(repaired.gaps_after.max()),
        "peak GiB": process.peak_bytes() / 2**30,
    }


def bench_depth(rounds: int, quick: bool) -> Numbers:
    """Extrapolates both steps to the giant's depth from the cost of a block.

    Two whole giants do not fit into memory side by side. Our step is the search, which
    grows with the block of the defect, plus a constant; the authors' step costs the
    same for every block.
    """
    config, size = giant_width(15, quick)
    theirs, _ = giant_width(8, quick)
    case = Case(config, size, config.depth - 1)
    whole = case.ours()
    case.directions = np.zeros_like(case.directions)  # no defect: only the search runs
    calls = {
        "ours": whole,
        "search": case.ours(),
        "baseline": Case(theirs, size, theirs.depth - 1).baseline("dense"),
    }
    numbers = summary(in_turn(rounds, **calls), "baseline")
    del numbers["times faster than baseline"]  # their depths differ
    seconds = numbers["seconds"]
    search = seconds["search"] / config.depth
    baseline = seconds["baseline"] / theirs.depth
    numbers["seconds a block"] = {"search": search, "baseline": baseline}
    for block in (19, 29, 39):
        ours = seconds["ours"] + (block + 1 - config.depth) * search
        numbers[f"defect in block {block}"] = {
            "ours": ours,
            "baseline": (block + 1) * baseline,
            "times faster": (block + 1) * baseline / ours,
        }
    return numbers


def bench_memory(rounds: int, quick: bool) -> Numbers:
    """Device memory and compile time of a step, for each of the hub's models."""
    del rounds
    models = ["dinov2_vits14"] if quick else [x for x in vit.CONFIGS if "reg" not in x]
    return {
        model: memory.of_step(vit.CONFIGS[model], 112 if quick else 518)
        for model in models
    }


def bench_features(rounds: int, quick: bool) -> Numbers:
    """Compares the forward pass with PyTorch's."""
    from benchmarks import features  # imports torch

    return features.bench_features(rounds, quick)


def bench_convert(rounds: int, quick: bool) -> Numbers:
    """Compares every conversion with copying the file, each in its own process."""
    model = "dinov2_vits14" if quick else "dinov2_vitg14"
    command = [sys.executable, "-m", "benchmarks.convert_giant", f"--model={model}"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout)


def bench_linear(rounds: int, quick: bool) -> Numbers:
    """Compares a step of the linear probe's 52 heads with PyTorch loops."""
    from benchmarks import linear_probe  # imports torch

    return linear_probe.bench_linear(rounds, quick)


def bench_crf(rounds: int, quick: bool) -> Numbers:
    """Compares the exact CRF with all pairs of pixels in PyTorch."""
    from benchmarks import crf  # imports torch

    return crf.bench_crf(rounds, quick)


def bench_cause(rounds: int, quick: bool) -> Numbers:
    """Compares a step of CAUSE-TR's second stage with PyTorch's."""
    from benchmarks import cause  # imports torch

    return cause.bench_cause(rounds, quick)


def bench_stego(rounds: int, quick: bool) -> Numbers:
    """Compares a step of STEGO with PyTorch's."""
    from benchmarks import stego_step  # imports torch

    return stego_step.bench_stego(rounds, quick)


BENCHMARKS: dict[str, Callable[[int, bool], Numbers]] = {
    "repair": bench_repair,
    "images": bench_images,
    "directions": bench_directions,
    "factorize": bench_factorize,
    "datafree": bench_datafree,
    "depth": bench_depth,
    "memory": bench_memory,
    "features": bench_features,
    "linear": bench_linear,
    "convert": bench_convert,
    "decode": decode.bench_decode,
    "class_tokens": evals.bench_class_tokens,
    "knn": evals.bench_knn,
    "crf": bench_crf,
    "cause": bench_cause,
    "stego": bench_stego,
}


def environment() -> Numbers:
    """Machine, versions and date."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def markdown(results: dict[str, Numbers]) -> str:
    """A table with the columns benchmark, what, value."""
    lines = ["| benchmark | what | value |", "|---|---|---|"]

    def add(name: str, path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(name, f"{path}, {key}" if path else key, inner)
        elif isinstance(value, float | int):
            lines.append(f"| {name} | {path} | {value:.4g} |")
        elif isinstance(value, str):
            lines.append(f"| {name} | {path} | {value} |")

    for name, numbers in results.items():
        add(name, "", numbers)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", type=Path, help="folder for JSON and Markdown")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small models")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(
            f"got benchmark {unknown[0]!r}, expected one of {', '.join(BENCHMARKS)}"
        )
    results: dict[str, Numbers] = {"run": environment()}
    print(markdown(results), flush=True)
    for name in args.names or BENCHMARKS:
        results[name] = BENCHMARKS[name](args.rounds, args.quick)
        print(markdown({name: results[name]}), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (args.out / "results.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
