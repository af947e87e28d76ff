"""Random models of any size, with a defect in a chosen block.

    config, seed --random orthonormal U, V and falling σ--> factors --> kernels, params
    params, image, block --> directions along which that block has outliers

The kernels are built from their factors, so even a giant needs no SVD.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sinder_jax import factor, kernels, param_tree, planted, vit

# Largest and smallest singular value of a kernel, relative to the largest of a random
# kernel whose entries have standard deviation 0.02.
SPREAD = (1.5, 0.1)


def random_params(config: vit.ViTConfig, seed: int = 0) -> dict:
    """Random weights on the host, of about the size of a trained model's."""
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


def plant_unit(config: vit.ViTConfig, params: dict[str, Any], block: int) -> None:
    """Makes hidden unit 0 of a block throw tokens, as in `planted.planted_model`."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(config.embed_dim, 2))
    trigger, direction = np.linalg.qr(vectors - vectors.mean(axis=0))[0].T
    throw = planted.THROW * direction / params["blocks"]["ls2"]["gamma"][block]
    threshold = planted.GATE * planted.THRESHOLD
    gate = planted.GATE * trigger
    planted.set_unit(params["blocks"]["mlp"], block, 0, gate, threshold, throw)


def outlier_direction(tokens: np.ndarray) -> np.ndarray:
    """A direction along which three of the patch tokens [H, W, D] are outliers."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    middle = tokens.shape[0] // 2
    rows = [(middle, column) for column in (3, 6, 9)]
    # Ridge regression that predicts 1 for these patches and 0 for the others.
    wanted = np.zeros(len(flat))
    for row, column in rows:
        wanted[row * tokens.shape[1] + column] = 1.0
    gram = flat @ flat.T
    weights = np.linalg.solve(
        gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram)), wanted
    )
    return flat.T @ weights


class Synthetic(NamedTuple):
    """A model and the factors that its kernels were built from.

    Attributes:
      config: the architecture.
      params: the params tree, NumPy float32.
      factors: factors of the trainable kernels.
      qk: factors of the query and key kernels, by (block, "q" or "k").
    """

    config: vit.ViTConfig
    params: dict[str, Any]
    factors: factor.Factors
    qk: dict[tuple[int, str], factor.KernelFactors]


def synthetic_model(config: vit.ViTConfig) -> Synthetic:
    """Builds a model whose kernels are U·diag(σ)·Vᵀ with random, known factors."""
    rng = np.random.default_rng(0)
    params = random_params(config, 0)
    factors = factor.Factors(u={}, sigma={}, v={})
    _, stacks = kernels.split(config, params)
    qk = {}
    for name, stack in stacks.items():
        made = [_factors(rng, kernel.shape) for kernel in stack]
        factors.u[name] = np.stack([each.u for each in made])
        factors.sigma[name] = np.stack([each.sigma for each in made])
        factors.v[name] = np.stack([each.v for each in made])
        for i, each in enumerate(made):
            kernels.view(config, params, i, name)[:] = _kernel(each)
    for i in range(config.depth):
        for name in "qk":
            each = qk[i, name] = _factors(rng, (config.embed_dim, config.embed_dim))
            kernels.view(config, params, i, f"attn/{name}")[:] = _kernel(each)
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


def defect_directions(
    config: vit.ViTConfig, params: dict[str, Any], image: np.ndarray, block: int
) -> np.ndarray:
    """Directions [L, D] along which `image` has its first defect in `block`.

    Args:
      config: the architecture.
      params: the params tree.
      image: [height, width, 3], normalized float32.
      block: block of the first defect, from 0.
    """
    found = np.zeros((config.depth, config.embed_dim))
    cut = dataclasses.replace(config, depth=block + 1)
    blocks = jax.tree.map(lambda x: x[: block + 1], params["blocks"])
    params = {**params, "blocks": blocks}
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
