"""Time and peak memory of one repair step on a random model of giant size.

    python -m benchmarks.giant_step [--model=dinov2_vitg14] [--size=224] [--steps=2]

A random model has no defect, so the last block gets a direction along which its tokens
have outliers: the search runs through all blocks and the backward pass through
`active_blocks` of them. The factors are computed as in a real run, by SVDs in float64;
the directions are not. Prints one JSON object.
"""

import argparse
import dataclasses
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import process, synthetic
from sinder_jax import factor, repair, vit


def main() -> None:
    """Measures the step and prints the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinov2_vitg14", choices=vit.CONFIGS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    config = dataclasses.replace(vit.CONFIGS[args.model], interpolate_antialias=True)
    options = repair.RepairOptions()
    numbers = {"model": args.model, "pixels": args.size, "machine": platform.machine()}
    numbers["device"] = jax.devices()[0].device_kind
    numbers["versions"] = {"jax": jax.__version__, "numpy": np.__version__}

    params = synthetic.random_params(config)
    image = np.random.default_rng(1).standard_normal((1, args.size, args.size, 3))
    image = image.astype(np.float32)
    directions = synthetic.defect_directions(config, params, image[0], config.depth - 1)

    start = time.perf_counter()
    factors = factor.factorize(config, params)
    numbers["factorize_s"] = time.perf_counter() - start
    frozen, state = repair.init(config, params, options, directions, factors)
    del params, factors

    step = repair.make_step(config, options)
    start = time.perf_counter()
    compiled = step.lower(state, frozen, jnp.asarray(image)).compile()
    numbers["compile_s"] = time.perf_counter() - start
    numbers["step_s"] = []
    for _ in range(args.steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(
            compiled(state, frozen, jnp.asarray(image))
        )
        numbers["step_s"].append(time.perf_counter() - start)
        numbers["layer"] = int(metrics.layer[0])
        numbers["outliers"] = int(metrics.num_outliers[0])
        numbers["loss"] = float(metrics.loss[0])
    numbers["peak_memory_gib"] = process.peak_bytes() / 2**30
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
