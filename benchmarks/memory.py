"""Device memory of the compiled repair step, without any weights.

    python -m benchmarks.memory [--model=dinov2_vitg14] [--size=518] [--images=1]
        [--devices=1]

Compiles the step from shapes alone, which takes seconds and little memory for any
model, and prints the compiler's own buffer sizes: `arguments` (model and state, updated
in place) and `work space` (temporary arrays). With --devices above 1 the model is split
over simulated devices, and the sizes are those of one device.
"""

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sinder_jax import factor, kernels, param_tree, placement, repair, vit

GIB = 2**30
AXIS = "images"


def shapes(
    config: vit.ViTConfig, options: repair.RepairOptions
) -> tuple[repair.RepairState, repair.Frozen]:
    """The shapes of the state and the frozen model that `repair.init` returns."""
    params = param_tree.shapes(config)
    frozen, stacks = jax.eval_shape(
        lambda params: kernels.split(config, params), params
    )

    def stacked(widths: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(
                (config.depth, *widths(*kernel.shape[1:])), jnp.float32
            )
            for name, kernel in stacks.items()
        }

    sigma = stacked(lambda i, o: (min(i, o),))
    factors = factor.Factors(
        u=stacked(lambda i, o: (o, min(i, o))),
        sigma=sigma,
        v=stacked(lambda i, o: (i, min(i, o))),
    )
    directions = jax.ShapeDtypeStruct((config.depth, config.embed_dim), jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = repair.RepairState(
        eps=sigma,
        momentum=sigma,
        merged=stacks,
        num_images=count,
        had_defect=jax.ShapeDtypeStruct((options.history,), jnp.bool_),
        num_counted=count,
        num_bad=count,
        bad_in_row=count,
    )
    return state, repair.Frozen(frozen, factors, directions)


def of_step(
    config: vit.ViTConfig, size: int, images: int = 1, devices: int = 1
) -> dict[str, float]:
    """Memory of one device in GiB, and the compile time in seconds.

    Args:
      config: the architecture.
      size: side of the images in pixels.
      images: images per step and device.
      devices: number of devices that the model is split over.
    """
    options = repair.RepairOptions()
    tree = shapes(config, options)
    pixels = jax.ShapeDtypeStruct((images * devices, size, size, 3), jnp.float32)
    sharding = None
    if devices > 1:
        mesh = Mesh(jax.devices()[:devices], AXIS)
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        specs = placement.partition((tree, pixels), AXIS)
        tree, pixels = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            (tree, pixels),
            specs,
        )
    began = time.perf_counter()
    step = repair.make_step(config, options, sharding)
    compiled = step.lower(*tree, pixels).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    return {
        "arguments GiB": memory.argument_size_in_bytes / GIB,
        "work space GiB": memory.temp_size_in_bytes / GIB,
        "compile seconds": seconds,
    }


def main() -> None:
    """Prints the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--model", default="dinov2_vitg14", choices=vit.CONFIGS)
    parser.add_argument("--size", type=int, default=518, help="pixels")
    parser.add_argument(
        "--images", type=int, default=1, help="images per step and device"
    )
    parser.add_argument(
        "--devices", type=int, default=1, help="devices that share the model"
    )
    args = parser.parse_args()
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    config = dataclasses.replace(vit.CONFIGS[args.model], interpolate_antialias=True)
    numbers = of_step(config, args.size, args.images, args.devices)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
