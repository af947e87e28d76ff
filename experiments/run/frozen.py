"""What a repair reads and never changes, computed once and stored in the workdir.

    weights --freeze--> params, factors, directions, in workdir/frozen --thaw--> same

Every start and every process of a run reads the stored ones: ε belongs to that basis.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.run import inputs
from experiments.run.progress import duration
from experiments.run.workdir import Workdir
from sinder_jax import checkpoint, defects, factor, param_tree, vit

FACTORS = ("u", "sigma", "v")


class Thawed(NamedTuple):
    """What `freeze` stored."""

    model: vit.ViTConfig
    params: dict[str, Any]
    factors: factor.Factors
    directions: np.ndarray
    provenance: dict[str, Any]


def freeze(
    config: ConfigDict,
    workdir: Workdir,
    told: Callable[[str], None] = lambda phase: None,
) -> None:
    """Loads the original weights, computes factors and directions, stores all three.

    Args:
      config: of the run.
      workdir: where they are stored.
      told: is told what is being computed.
    """
    if config.model == inputs.PLANTED:
        with workdir.output("planted.safetensors") as path:
            model, params, provenance = inputs.load_model(config, path)
    else:
        model, params, provenance = inputs.load_model(config)
    vit.patch_grid(model, config.image_size, config.image_size)
    began = time.monotonic()
    told("directions")
    print(f"directions of {model.depth} blocks, {config.method}", flush=True)
    found = defects.singular_defects(
        model,
        params,
        config.method,
        key=jax.random.key(config.seed),
        num_probes=config.num_probes,
    )
    told("singular values")
    print(f"singular values of {4 * model.depth} kernels", flush=True)
    factors = factor.factorize(model, params)
    print(f"both took {duration(time.monotonic() - began)}", flush=True)
    tree = {
        "params": params,
        "factors": {
            part: param_tree.unflatten(getattr(factors, part)) for part in FACTORS
        },
        "directions": found.directions.astype(np.float32),
    }
    header = {
        "config": model.as_dict(),
        "gaps": found.gaps.tolist(),
        "provenance": provenance,
    }
    told("storing the original model")
    checkpoint.save_tree(workdir.frozen, tree, header)


def thaw(workdir: Workdir) -> Thawed:
    """Reads what `freeze` stored."""
    tree, header = checkpoint.load_tree(workdir.frozen)
    model = vit.ViTConfig(**header["config"])
    return Thawed(
        model,
        tree["params"],
        factor.Factors(
            **{part: param_tree.flatten(tree["factors"][part]) for part in FACTORS}
        ),
        tree["directions"],
        header["provenance"],
    )
