"""Ablation: what throws tokens writes nothing along the throw any more.

    params --forecast--> the block that throws, and which half of it is to blame
    its linear map --thrown--> the line along which that half throws
    W_out --ablate--> a W_out whose output has no part along the line

From the weights alone, NumPy float64 on the host: no image is read.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from sinder_jax import defects, kernels, param_tree
from sinder_jax.analysis import forecast
from sinder_jax.linalg import TINY
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig


def ablate(
    config: ViTConfig, params: Params, *, found: forecast.Forecast | None = None
) -> dict[str, Any]:
    """Projects the throw out of what the blamed half of the defect's block writes.

    The half, attention or FFN, is that of the kernel with the largest share of the
    gain. It adds γ·(W_out·h + b) to every token, so what has to be zero is
    lᵀ·diag(γ)·(W_out·h + b) for every h, with l the line of `thrown`. Of all such
    changes this is the least one in what tokens get: diag(γ)·W_out becomes
    (I − l·lᵀ)·diag(γ)·W_out, and likewise for b. The bias has to follow, since it
    balances the mean of W_out·h: alone, it would push every token along l.

    Channels with γ = 0 get nothing from this half. They keep their weights, and l has
    no part there.

    Args:
      config: the architecture.
      params: the params tree; it is not changed.
      found: the forecast, if it is known already; None: made here.

    Returns:
      A params tree; the same leaves, bit for bit, where no defect is forecast.

    Example:
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> mended = ablate(made.config, made.params)
      >>> forecast.forecast(made.config, mended).has_defect
      False
    """
    found = forecast.forecast(config, params) if found is None else found
    flat = param_tree.flatten(params)
    if not found.has_defect:
        return param_tree.unflatten(flat)
    block, names = found.block, kernels.names(config)
    weights = kernels.weights(config, params, block)
    in_ffn = found.blamed[0].kernel in names[2:]
    name, gamma = (names[3], weights.gamma2) if in_ffn else (names[1], weights.gamma1)
    line = thrown(weights, found.directions[block], in_ffn=in_ffn)
    for leaf in ("kernel", "bias"):
        path = f"blocks/{name}/{leaf}"
        flat[path] = np.array(flat[path])
        flat[path][block] = _without(line, gamma, flat[path][block].astype("f8"))
    return param_tree.unflatten(flat)


def thrown(
    weights: kernels.BlockWeights,
    direction: Float[np.ndarray, " D"],
    *,
    in_ffn: bool,
) -> Float[np.ndarray, " D"]:
    """The line along which one half of a block throws.

    It is what the half adds, by its linear map, to the input that the whole block
    answers most along ν: (A − I)·t, or (M − I)·A·t, with t = Eᵀν. ν itself is a
    singular vector of a product of maps I + …, which leans toward the input by about
    one over the gap: 3° in planted models, enough to leave a twentieth of the throw.

    Args:
      weights: of the block.
      direction: ν of the block.
      in_ffn: whether the half is the FFN; else it is attention.

    Returns:
      A unit vector, of either sign.
    """
    attention, ffn = defects.attention_map(weights), defects.ffn_map(weights)
    trigger = attention.T @ (ffn.T @ direction)
    after = attention @ trigger
    added = ffn @ after - after if in_ffn else after - trigger
    return added / max(np.linalg.norm(added), TINY)


def _without(
    line: Float[np.ndarray, " D"],
    gamma: Float[np.ndarray, " D"],
    leaf: Float[np.ndarray, "*in D"],
) -> Float[np.ndarray, "*in D"]:
    """A kernel or bias whose rows, times γ, have no part along the line."""
    along = (leaf * gamma) @ line
    return leaf - along[..., None] * line / np.where(gamma == 0, 1.0, gamma)
