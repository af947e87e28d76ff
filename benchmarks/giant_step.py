"""One whole repair step of a giant-shaped random model: time and peak memory.

    python -m benchmarks.giant_step [--model=dinov2_vitg14] [--size=224] [--steps=2]

Weights are random, so there is no defect to find by itself: a direction is given along
which tokens of the last block have outliers, so that the search runs through all blocks
and the way back through `active_blocks` of them. Directions are not computed here;
factors are, by the float64 SVD of a real run. Prints one JSON object.
"""

import argparse
import dataclasses
import json
import platform
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from sinder_jax import factor, param_tree, repair, vit
from sinder_jax.analysis.tokens import last_patches


def random_params(config: vit.ViTConfig, seed: int = 0) -> dict:
    """Random weights of the scale of a trained model's, made on the host."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "scale":
            return np.ones(shape.shape, np.float32)
        if name == "gamma":
            return np.full(shape.shape, 0.1, np.float32)
        array = rng.standard_normal(shape.shape, np.float32)
        array *= np.float32(0.02)
        return array

    return jax.tree_util.tree_map_with_path(leaf, param_tree.shapes(config))


def outlier_direction(tokens: np.ndarray) -> np.ndarray:
    """A direction along which three of the patch tokens [H, W, D] are outliers."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    middle = tokens.shape[0] // 2
    rows = [(middle, column) for column in (3, 6, 9)]
    # Ridge regression of the indicator of three patches on their tokens.
    wanted = np.zeros(len(flat))
    for row, column in rows:
        wanted[row * tokens.shape[1] + column] = 1.0
    gram = flat @ flat.T
    weights = np.linalg.solve(
        gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram)), wanted
    )
    return flat.T @ weights


def main() -> None:
    """Runs the benchmark and prints its numbers as JSON."""
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

    params = random_params(config)
    image = np.random.default_rng(1).standard_normal((1, args.size, args.size, 3))
    image = image.astype(np.float32)
    patches = last_patches(config, params, image[0])
    directions = np.zeros((config.depth, config.embed_dim), np.float32)
    directions[-1] = outlier_direction(np.asarray(patches, np.float64))

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
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    numbers["peak_memory_gib"] = peak / 2**30
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
