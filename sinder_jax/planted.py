"""A small random model shaped like DINOv2 with a planted singular defect.

    seed --random weights, one hand-made FFN unit--> `PlantedModel`

For the demo and the tests; nothing here is trained. The defect is planted the way large
models have it: in a middle block, the gate of one hidden unit opens for a few tokens of
every image and throws them far along one direction. The linear map of the block shows
the throw: from that block on, `defects.singular_defect_directions` returns the planted
direction.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from sinder_jax.vit import ViTConfig

CONFIG = ViTConfig(
    embed_dim=128, depth=12, num_heads=2, ffn_layer="swiglu", img_size=224
)
WIDTH = CONFIG.embed_dim
BLOCK = 5
NUM_SPOTS = 7  # positions whose tokens lean toward the trigger
SPOT = 2.2  # how far, in standard deviations of a token's channels
GATE = 8.0  # norm of the gate's weight row
THRESHOLD = 0.7  # the gate opens above this many standard deviations
THROW = 9.0  # norm of the output column
LAYER_SCALE = 0.08  # of all other layers
CONTENT = 0.045  # scale of the patch embedding
NOISE = 0.6  # of the position embedding
LEAN = 2.5  # of every patch token along the direction; a token's norm is about 9


class PlantedModel(NamedTuple):
    """A model and the defect planted in it.

    Attributes:
      config: the architecture; its stored grid of 16 x 16 patches fits 224 px images.
      params: the params tree, NumPy float32.
      block: the block whose FFN throws tokens.
      direction: the unit vector [D] along which the block throws them.
    """

    config: ViTConfig
    params: dict[str, Any]
    block: int
    direction: Float[np.ndarray, " D"]


def planted_model(seed: int = 0) -> PlantedModel:
    """A random model whose block 5 throws a handful of tokens of every image.

    Args:
      seed: of all random weights.
    """
    rng = np.random.default_rng(seed)
    trigger, direction = pair = _orthonormal_pair(rng)
    blocks = _random_blocks(rng, trigger)
    _plant(blocks["mlp"], trigger, direction)
    blocks["ls2"]["gamma"][BLOCK] = 1.0
    params = {
        "cls_token": rng.normal(0, 0.5, (1, 1, WIDTH)),
        "mask_token": np.zeros((1, WIDTH)),
        "pos_embed": _position_embedding(rng, *pair),
        "patch_embed": _patch_embedding(rng, *pair),
        "blocks": blocks,
        "norm": _layer_norm(WIDTH),
    }
    return PlantedModel(CONFIG, jax.tree.map(np.float32, params), BLOCK, direction)


def _orthonormal_pair(rng: np.random.Generator) -> np.ndarray:
    """Two random orthonormal vectors of zero mean, which a LayerNorm lets through."""
    vectors = rng.normal(size=(WIDTH, 2))
    q, _ = np.linalg.qr(vectors - vectors.mean(axis=0))
    return q.T


def _plant(mlp: dict, trigger: np.ndarray, direction: np.ndarray) -> None:
    """Makes hidden unit 0 silu(GATE·(trigger·x − THRESHOLD))·1, thrown by THROW."""
    w12, b12 = mlp["w12"]["kernel"][BLOCK], mlp["w12"]["bias"][BLOCK]
    value = CONFIG.hidden_dim  # w12 computes the gates first, then the values
    w12[:, 0], b12[0] = GATE * trigger, -GATE * THRESHOLD
    w12[:, value], b12[value] = 0.0, 1.0
    mlp["w3"]["kernel"][BLOCK][0] = THROW * direction


def _random_blocks(rng: np.random.Generator, trigger: np.ndarray) -> dict[str, Any]:
    """Blocks that change tokens mildly, and hardly at all along `trigger`."""
    depth, hidden = CONFIG.depth, CONFIG.hidden_dim

    def dense(width_in: int, width_out: int) -> dict[str, np.ndarray]:
        kernel = rng.normal(0, width_in**-0.5, (depth, width_in, width_out))
        return {"kernel": kernel, "bias": np.zeros((depth, width_out))}

    proj, w3 = dense(WIDTH, WIDTH), dense(hidden, WIDTH)
    for layer in (proj, w3):
        layer["kernel"] = _damped(layer["kernel"], trigger, 0.1)
    return {
        "norm1": _layer_norm(depth, WIDTH),
        "attn": {"qkv": dense(WIDTH, 3 * WIDTH), "proj": proj},
        "ls1": {"gamma": np.full((depth, WIDTH), LAYER_SCALE)},
        "norm2": _layer_norm(depth, WIDTH),
        "mlp": {"w12": dense(WIDTH, 2 * hidden), "w3": w3},
        "ls2": {"gamma": np.full((depth, WIDTH), LAYER_SCALE)},
    }


def _patch_embedding(
    rng: np.random.Generator, trigger: np.ndarray, direction: np.ndarray
) -> dict[str, np.ndarray]:
    """Random mixtures of a patch's low cosine frequencies, quiet along both vectors.

    The bias gives all tokens the same small cosine with `direction`, so that |cos| has
    one tail and no token is an outlier by chance.
    """
    side, waves = CONFIG.patch_size, np.arange(4)
    cosine = np.cos(np.pi * (np.arange(side)[:, None] + 0.5) * waves[None, :] / side)
    cosine /= np.linalg.norm(cosine, axis=0)
    decay = 1.0 / (1.0 + waves[:, None] + waves[None, :])
    decay[0, 0] = 0.5  # a larger one would tell dark photographs from bright ones
    mixture = rng.normal(size=(len(waves), len(waves), 3, WIDTH))
    mixture *= decay[:, :, None, None]
    kernel = np.einsum("pi,qj,ijcd->pqcd", cosine, cosine, mixture)
    kernel = _damped(_damped(kernel, trigger, 0.15), direction, 0.8)
    return {"kernel": CONTENT * kernel, "bias": LEAN * direction}


def _position_embedding(
    rng: np.random.Generator, trigger: np.ndarray, direction: np.ndarray
) -> np.ndarray:
    """Noise, quiet along both vectors, with a few spots that lean along `trigger`."""
    side = CONFIG.grid_size
    noise = rng.normal(0, NOISE, (side * side, WIDTH))
    noise = _damped(_damped(noise, trigger, 0.1), direction, 0.8)
    inner = np.arange(side * side).reshape(side, side)[2:-2, 2:-2].ravel()
    noise[rng.choice(inner, NUM_SPOTS, replace=False)] += SPOT * trigger
    return np.concatenate([np.zeros((1, 1, WIDTH)), noise[None]], axis=1)


def _damped(vectors: np.ndarray, direction: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the part of `vectors` along a unit vector by `factor`."""
    along = (vectors @ direction)[..., None] * direction
    return vectors - (1 - factor) * along


def _layer_norm(*shape: int) -> dict[str, np.ndarray]:
    return {"scale": np.ones(shape), "bias": np.zeros(shape)}
