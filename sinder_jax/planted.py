"""A small model shaped like DINOv2 with a planted singular defect: demo and tests.

    seed --random weights, one FFN unit made by hand--> `PlantedModel`

Nothing here is trained. The defect is planted the way large models have it: in a middle
block, the gate of one hidden unit opens for a few tokens of every image and throws them
far along one direction. The linear map of the block shows it: from that block on,
`defects.singular_defect_directions` returns the planted direction.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from sinder_jax.vit import ViTConfig

CONFIG = ViTConfig(
    embed_dim=128, depth=12, num_heads=2, ffn_layer="swiglu", img_size=224
)
BLOCK = 5
NUM_SPOTS = 7  # positions whose tokens lean towards the trigger
SPOT = 2.2  # how far, in standard deviations of a token's channels
GATE = 8.0  # norm of the gate's row
THRESHOLD = 0.7  # the gate opens from this many standard deviations on
THROW = 9.0  # norm of the output column
LAYER_SCALE = 0.08  # of all other layers
CONTENT = 0.045  # scale of the patch embedding
NOISE = 0.6  # of the position embedding
LEAN = 2.5  # of every patch token along the direction; tokens have norm 9


class PlantedModel(NamedTuple):
    """A model and what was planted in it.

    Attributes:
      config: the architecture; 224 px are its stored grid of 16 x 16 patches.
      params: the params tree, NumPy float32.
      block: the block whose FFN throws tokens.
      direction: the unit vector [D] along which they are thrown.
    """

    config: ViTConfig
    params: dict[str, Any]
    block: int
    direction: Float[np.ndarray, " D"]


def planted_model(seed: int = 0) -> PlantedModel:
    """A random model whose block 5 throws a handful of tokens of any image.

    Args:
      seed: of all random weights.
    """
    rng = np.random.default_rng(seed)
    config = CONFIG
    trigger, direction = _orthonormal_pair(rng, config.embed_dim)
    blocks = _random_blocks(rng, config, trigger)
    _plant(blocks["mlp"], BLOCK, trigger, direction)
    blocks["ls2"]["gamma"][BLOCK] = 1.0
    params = {
        "cls_token": rng.normal(0, 0.5, (1, 1, config.embed_dim)),
        "mask_token": np.zeros((1, config.embed_dim)),
        "pos_embed": _position_embedding(rng, config, trigger, direction),
        "patch_embed": _patch_embedding(rng, config, trigger, direction),
        "blocks": blocks,
        "norm": _layer_norm((config.embed_dim,)),
    }
    params = jax.tree.map(np.float32, params)
    return PlantedModel(config, params, BLOCK, direction)


def _orthonormal_pair(rng: np.random.Generator, width: int) -> np.ndarray:
    """Two random orthonormal vectors without mean, which a LayerNorm lets through."""
    vectors = rng.normal(size=(width, 2))
    q, _ = np.linalg.qr(vectors - vectors.mean(axis=0))
    return q.T


def _plant(mlp: dict, block: int, trigger: np.ndarray, direction: np.ndarray) -> None:
    """Makes hidden unit 0: silu(GATE·(trigger·x − THRESHOLD))·1, thrown by THROW."""
    hidden = mlp["w3"]["kernel"].shape[1]
    w12, b12 = mlp["w12"]["kernel"][block], mlp["w12"]["bias"][block]
    w12[:, 0], b12[0] = GATE * trigger, -GATE * THRESHOLD
    w12[:, hidden], b12[hidden] = 0.0, 1.0
    mlp["w3"]["kernel"][block][0] = THROW * direction


def _random_blocks(
    rng: np.random.Generator, config: ViTConfig, trigger: np.ndarray
) -> dict[str, Any]:
    """Blocks that change tokens mildly, and hardly along `trigger`."""
    depth, width, hidden = config.depth, config.embed_dim, config.hidden_dim

    def dense(width_in: int, width_out: int) -> dict[str, np.ndarray]:
        kernel = rng.normal(0, width_in**-0.5, (depth, width_in, width_out))
        return {"kernel": kernel, "bias": np.zeros((depth, width_out))}

    proj, w3 = dense(width, width), dense(hidden, width)
    for layer in (proj, w3):
        layer["kernel"] = _damped(layer["kernel"], trigger, 0.1)
    return {
        "norm1": _layer_norm((depth, width)),
        "attn": {"qkv": dense(width, 3 * width), "proj": proj},
        "ls1": {"gamma": np.full((depth, width), LAYER_SCALE)},
        "norm2": _layer_norm((depth, width)),
        "mlp": {"w12": dense(width, 2 * hidden), "w3": w3},
        "ls2": {"gamma": np.full((depth, width), LAYER_SCALE)},
    }


def _patch_embedding(
    rng: np.random.Generator,
    config: ViTConfig,
    trigger: np.ndarray,
    direction: np.ndarray,
) -> dict[str, np.ndarray]:
    """Random mixtures of a patch's low cosine frequencies, quiet along the pair.

    The bias gives all tokens the same small cosine with `direction`, so that |cos| has
    one tail and none of them is an outlier by chance.
    """
    side, width, waves = config.patch_size, config.embed_dim, 4
    phase = np.pi * (np.arange(side)[:, None] + 0.5) * np.arange(waves)[None, :] / side
    cosine = np.cos(phase) / np.linalg.norm(np.cos(phase), axis=0)
    decay = 1.0 / (1.0 + np.arange(waves)[:, None] + np.arange(waves)[None, :])
    decay[0, 0] = 0.5  # else dark photographs would have other tokens than bright ones
    mixture = rng.normal(size=(waves, waves, 3, width)) * decay[:, :, None, None]
    kernel = np.einsum("pi,qj,ijcd->pqcd", cosine, cosine, mixture)
    kernel = _damped(_damped(kernel, trigger, 0.15), direction, 0.8)
    return {"kernel": CONTENT * kernel, "bias": LEAN * direction}


def _position_embedding(
    rng: np.random.Generator,
    config: ViTConfig,
    trigger: np.ndarray,
    direction: np.ndarray,
) -> np.ndarray:
    """Noise, quiet along the pair, and a few spots that lean along `trigger`."""
    side, width = config.grid_size, config.embed_dim
    noise = rng.normal(0, NOISE, (side * side, width))
    noise = _damped(_damped(noise, trigger, 0.1), direction, 0.8)
    inner = np.arange(side * side).reshape(side, side)[2:-2, 2:-2].ravel()
    spots = rng.choice(inner, NUM_SPOTS, replace=False)
    noise[spots] += SPOT * trigger
    return np.concatenate([np.zeros((1, 1, width)), noise[None]], axis=1)


def _damped(vectors: np.ndarray, direction: np.ndarray, factor: float) -> np.ndarray:
    """`vectors` with their part along `direction` multiplied by `factor`."""
    along = (vectors @ direction)[..., None] * direction
    return vectors - (1 - factor) * along


def _layer_norm(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {"scale": np.ones(shape), "bias": np.zeros(shape)}
