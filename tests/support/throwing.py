"""Random models whose FFNs throw tokens along known directions: small, of any kind."""

import numpy as np

from sinder_jax import param_tree

GATE, THRESHOLD, THROW = 8.0, 0.7, 9.0  # as `planted.planted_model`
LAYER_SCALE = 0.08


def throwing(config, blocks, *, directions=None, throw=THROW, seed=0):
    """Params and the directions [len(blocks), D] along which those blocks throw.

    Hidden unit k of the k-th block throws, set off by a trigger of its own.

    Args:
      config: of the model.
      blocks: which throw, one unit for each mention.
      directions: which throw along the same line, such as (0, 0); None: all differ.
      throw: norm of the throw.
      seed: of all that is random.
    """
    rng, width = np.random.default_rng(seed), config.embed_dim
    flat = {
        path: np.float32(_leaf(rng, config, path, leaf.shape))
        for path, leaf in param_tree.flatten(param_tree.shapes(config)).items()
    }
    vectors = rng.normal(size=(width, 2 * len(blocks)))
    vectors -= vectors.mean(axis=0)
    triggers, lines = np.split(np.linalg.qr(vectors)[0].T, 2)
    lines = lines[list(directions or range(len(blocks)))]
    first, last = ("w12", "w3") if config.ffn_layer == "swiglu" else ("fc1", "fc2")
    for unit, block in enumerate(blocks):
        layer = flat[f"blocks/mlp/{first}/kernel"][block]
        bias = flat[f"blocks/mlp/{first}/bias"][block]
        layer[:, unit], bias[unit] = GATE * triggers[unit], -GATE * THRESHOLD
        if first == "w12":  # gates, then values
            value = len(bias) // 2 + unit
            layer[:, value], bias[value] = 0.0, 1.0
        gamma = flat["blocks/ls2/gamma"][block]
        flat[f"blocks/mlp/{last}/kernel"][block][unit] = throw * lines[unit] / gamma
    return param_tree.unflatten(flat), lines


def _leaf(rng, config, path, shape):
    if path.endswith("kernel"):
        return rng.normal(0, shape[-2] ** -0.5, shape)
    if path.endswith("gamma"):
        return np.full(shape, 1.0 if config.layer_scale is False else LAYER_SCALE)
    if path.endswith(("scale", "bias")):
        return np.full(shape, float(path.endswith("scale")))
    return rng.normal(0, 0.5, shape)
