"""Models of any size made from their factors, with a defect where it is asked for.

    config, seed --random orthonormal U, V and falling σ--> factors --> kernels, params
    params, image, block --> directions along which that block has outliers

No SVD is needed, so a giant's blocks are made in seconds: the factors are the model's.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.giant_step import outlier_direction, random_params
from sinder_jax import factor, kernels, vit

# Largest and smallest singular value of a kernel [in, out], relative to those of a
# random one with entries of standard deviation 0.02.
SPREAD = (1.5, 0.1)


class Synthetic(NamedTuple):
    """A model and the factors it was made from.

    Attributes:
      config: the architecture.
      params: the params tree, NumPy float32.
      factors: of its trainable kernels.
      qk: factors of the q and k kernels, by (block, "q" or "k").
    """

    config: vit.ViTConfig
    params: dict[str, Any]
    factors: factor.Factors
    qk: dict[tuple[int, str], factor.KernelFactors]


def synthetic_model(config: vit.ViTConfig, seed: int = 0) -> Synthetic:
    """A model whose kernels are U·diag(σ)·Vᵀ of known, random factors."""
    rng = np.random.default_rng(seed)
    params = random_params(config, seed)
    factors = factor.Factors(u={}, sigma={}, v={})
    _, stacks = kernels.split(config, params)
    blocks = params["blocks"]
    qk = {}
    for name, stack in stacks.items():
        made = [_factors(rng, kernel.shape) for kernel in stack]
        factors.u[name] = np.stack([each.u for each in made])
        factors.sigma[name] = np.stack([each.sigma for each in made])
        factors.v[name] = np.stack([each.v for each in made])
        for i, each in enumerate(made):
            _target(blocks, name)[i] = _kernel(each)
    width = config.embed_dim
    for i in range(config.depth):
        for third, name in enumerate("qk"):
            each = qk[i, name] = _factors(rng, (width, width))
            part = blocks["attn"]["qkv"]["kernel"][i]
            part[:, third * width : (third + 1) * width] = _kernel(each)
    return Synthetic(config, params, factors, qk)


def _factors(rng: np.random.Generator, shape: tuple[int, int]) -> factor.KernelFactors:
    width_in, width_out = shape
    size = min(shape)
    u, v = (
        np.asarray(jnp.linalg.qr(rng.standard_normal((width, size), np.float32))[0])
        for width in (width_out, width_in)
    )
    largest = 0.02 * (np.sqrt(width_in) + np.sqrt(width_out))
    sigma = largest * np.linspace(*SPREAD, size)
    return factor.KernelFactors(u, sigma.astype(np.float32), v)


def _kernel(factors: factor.KernelFactors) -> np.ndarray:
    return np.asarray(factor.merge_kernel(factors.u, factors.sigma, factors.v))


def _target(blocks: dict[str, Any], name: str) -> np.ndarray:
    """The stacked kernel [L, in, out] inside the params, a view."""
    part, layer = name.split("/")
    if layer != "v":
        return blocks[part][layer]["kernel"]
    kernel = blocks["attn"]["qkv"]["kernel"]
    return kernel[..., -kernel.shape[1] :]


def defect_directions(model: Synthetic, image: np.ndarray, block: int) -> np.ndarray:
    """Directions [L, D] that find a defect of `image` in `block`, and none before.

    Args:
      model: the model.
      image: [height, width, 3], normalized float32.
      block: where its first defect is to be.
    """
    config, found = model.config, np.zeros((model.config.depth, model.config.embed_dim))
    cut = dataclasses.replace(config, depth=block + 1)
    params = {
        **model.params,
        "blocks": jax.tree.map(lambda x: x[: block + 1], model.params["blocks"]),
    }
    apply = jax.jit(
        lambda params, image: vit.ViT(cut).apply(
            {"params": params}, image[None], blocks=(block,), method="intermediates"
        )
    )
    (tokens,) = apply(params, jnp.asarray(image))
    rows, columns = vit.patch_grid(config, *image.shape[:2])
    patches = vit.split_tokens(config, tokens, rows, columns)[2][0]
    found[block] = outlier_direction(np.asarray(patches, np.float64))
    return found.astype(np.float32)
