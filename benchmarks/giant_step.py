"""Seconds, share of peak and memory of one repair step on a random model of giant size.

    python -m benchmarks.giant_step [--model=dinov2_vitg14] [--size=518]
        [--blocks=19,39] [--images=1] [--precisions=highest] [--steps=5] [--authors]

For each block, the model gets a direction along which that block's tokens have
outliers: the search runs up to it and the backward pass through `active_blocks` blocks.
Peak is what a large square product reaches in the same precision, in the same run. With
--authors, the authors' step in PyTorch takes turns with ours on the same weights and
image, on the same device: its memory must hold both. Prints one JSON object per row.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import operations, process, synthetic
from sinder_jax import repair, vit


def median_seconds(call: Callable[[], Any], steps: int) -> float:
    """Median time of `call`, which must wait for its result."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def peak_tflops(precision: str, size: int) -> float:
    """TFLOP/s of the product of two random [size, size] float32 matrices."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.float32) for key in keys)
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    jax.block_until_ready(product(a, b))
    seconds = median_seconds(lambda: jax.block_until_ready(product(a, b)), 10)
    return 2 * size**3 / seconds / 1e12


class Steps:
    """Steps of one model and image, ours and the authors'.

    Args:
      config: the architecture.
      size: side of the image in pixels.
    """

    def __init__(self, config: vit.ViTConfig, size: int):
        self.model = synthetic.synthetic_model(config)
        rng = np.random.default_rng(1)
        self.image = rng.standard_normal((size, size, 3)).astype(np.float32)
        self.tokens = 1 + config.num_register_tokens + (size // config.patch_size) ** 2

    def directions(self, block: int) -> np.ndarray:
        """Directions [L, D] with which the first defect is in `block`."""
        return synthetic.defect_directions(
            self.model.config, self.model.params, self.image, block
        )

    def ours(
        self,
        directions: np.ndarray,
        block: int,
        images: int,
        precision: str,
        steps: int,
    ) -> dict[str, Any]:
        """Compiles and times our step; GFLOP are those of all its images."""
        config = self.model.config
        options = repair.RepairOptions(matmul_precision=precision)
        frozen, state = repair.init(
            config, self.model.params, options, directions, self.model.factors
        )
        batch = jnp.asarray(np.repeat(self.image[None], images, axis=0))
        start = time.perf_counter()
        step = repair.make_step(config, options).lower(state, frozen, batch).compile()
        compile_seconds = time.perf_counter() - start
        metrics = None

        def call() -> None:
            nonlocal state, metrics
            state, metrics = jax.block_until_ready(step(state, frozen, batch))

        call()  # warm up
        assert metrics is not None
        first = float(metrics.loss[0])
        if (found := int(metrics.layer[0])) != block:
            raise RuntimeError(f"got the defect in block {found}, expected {block}")
        seconds = median_seconds(call, steps)
        if (found := int(metrics.layer[0])) != block:
            raise RuntimeError(f"the steps moved the defect from {block} to {found}")
        part = operations.our_step(config, self.tokens, block)
        return {
            "seconds": seconds,
            "GFLOP": images * (part.total - part.merge) + part.merge,
            "compile seconds": compile_seconds,
            "first loss": first,
            "outliers": int(metrics.num_outliers[0]),
        }

    def authors(self, directions: np.ndarray, block: int, steps: int) -> dict[str, Any]:
        """Times the authors' step in PyTorch, on its default device."""
        from benchmarks import torch_baseline

        baseline = torch_baseline.Baseline(
            self.model.config,
            self.model.params,
            self.model.factors,
            self.model.qk,
            directions,
            repair.RepairOptions(),
        )
        first = baseline.step(self.image)
        if first.layer != block:
            raise RuntimeError(f"got the defect in block {first.layer}, not {block}")

        def call() -> None:
            found = baseline.step(self.image).layer
            torch_baseline.wait()
            if found != block:
                raise RuntimeError(
                    f"the steps moved the defect from {block} to {found}"
                )

        call()
        return {
            "seconds": median_seconds(call, steps),
            "GFLOP": operations.authors_step(self.model.config, self.tokens, block),
            "first loss": first.loss,
        }


def device_memory() -> dict[str, float]:
    """Largest memory in use so far, in GiB: the device's where it counts, or ours."""
    counted = jax.devices()[0].memory_stats()
    if counted and "peak_bytes_in_use" in counted:
        return {"peak device GiB": counted["peak_bytes_in_use"] / 2**30}
    return {"peak process GiB": process.peak_bytes() / 2**30}


def main() -> None:
    """Measures the steps and prints a JSON object for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.giant_step")
    parser.add_argument("--model", default="dinov2_vitg14", choices=vit.CONFIGS)
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--blocks", default="39")
    parser.add_argument("--images", default="1")
    parser.add_argument("--precisions", default="highest")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--authors", action="store_true")
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    config = dataclasses.replace(vit.CONFIGS[args.model], interpolate_antialias=True)
    both = Steps(config, args.size)
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "model": args.model,
                "pixels": args.size,
            }
        ),
        flush=True,
    )
    precisions = args.precisions.split(",")
    peaks = {name: peak_tflops(name, 2048 if on_cpu else 8192) for name in precisions}

    def show(who: str, row: dict[str, Any], peak: float, **more: Any) -> None:
        rate = row["GFLOP"] / row["seconds"] / 1e3
        rates = {"TFLOP/s": rate, "peak TFLOP/s": peak, "share of peak": rate / peak}
        numbers = {**row, **rates, **device_memory()}
        rounded = {name: float(f"{number:.5g}") for name, number in numbers.items()}
        print(json.dumps({"step": who, **more, **rounded}), flush=True)

    for block in map(int, args.blocks.split(",")):
        directions = both.directions(block)
        for precision in precisions:
            for images in map(int, args.images.split(",")):
                row = both.ours(directions, block, images, precision, args.steps)
                what = {"block": block, "images": images, "precision": precision}
                show("ours", row, peaks[precision], **what)
            if args.authors:
                from benchmarks import torch_baseline

                torch_baseline.set_device(on_cpu)
                torch_baseline.set_precision(precision)
                row = both.authors(directions, block, args.steps)
                what = {"block": block, "images": 1, "precision": precision}
                show("authors'", row, peaks[precision], **what)


if __name__ == "__main__":
    main()
