"""Models with a planted singular defect, so that the truth is known.

    seed --random weights, one hand-made FFN unit--> a small `PlantedModel`
    any trained model, photographs --plant--> `PlantedModel` with the same defect

The defect is planted the way large models have it: the gate of one hidden unit opens
for a few tokens of every image and throws them far along one direction. The linear map
of the block shows the throw: from that block on, `defects.singular_defect_directions`
returns the planted direction. Which tokens: the position embedding leans toward the
gate's trigger at a few spots, and content does the rest.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sinder_jax import vit
from sinder_jax.analysis.tokens import AnyArray, last_patches
from sinder_jax.linalg import solve
from sinder_jax.model import Model
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


# Of a defect in a trained model.
SPACING = 3  # patches between two spots, which are therefore no neighbors
KEPT = (6, 12)  # fewest and most spots, those that open the gate most reliably ...
PER_SPOT = 110  # ... one for so many patches
SPOT_LEAN = 0.1  # of a spot, by the norm of the embedded token
RESPONSES = 4  # random leans measured for each channel of a token
RARE = 0.9999  # share of the other tokens that the gate stays closed for
CLEAR = 2.2  # how far a leaning token gets, times the threshold
RIDGE = 1e-3  # of the mean variance, to invert a covariance
FAR = 5.0  # a thrown token's norm in the last block, times the median there


class PlantedModel(NamedTuple):
    """A model and the defect planted in it.

    Attributes:
      config: the architecture.
      params: the params tree, NumPy float32.
      block: the block whose FFN throws tokens.
      direction: the unit vector [D] along which the block throws them.
      unit: the hidden unit of that FFN whose gate opens for them.
    """

    config: ViTConfig
    params: dict[str, Any]
    block: int
    direction: Float[np.ndarray, " D"]
    unit: int = 0


def planted_model(seed: int = 0) -> PlantedModel:
    """A random model whose block 5 throws a handful of tokens of every image.

    Args:
      seed: of all random weights.
    """
    rng = np.random.default_rng(seed)
    trigger, direction = pair = _orthonormal_pair(rng)
    blocks = _random_blocks(rng, trigger)
    gate, throw = GATE * trigger, THROW * direction
    set_unit(blocks["mlp"], BLOCK, 0, gate, GATE * THRESHOLD, throw)
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


def set_unit(
    mlp: Mapping[str, Any],
    block: int,
    unit: int,
    gate: Float[np.ndarray, " D"],
    threshold: float,
    column: Float[np.ndarray, " D"],
) -> None:
    """Makes a hidden unit act(gate·x − threshold), times 1 for SwiGLU, on `column`."""
    first, last = ("w12", "w3") if "w12" in mlp else ("fc1", "fc2")
    kernel, bias = mlp[first]["kernel"][block], mlp[first]["bias"][block]
    kernel[:, unit], bias[unit] = gate, -threshold
    if first == "w12":  # computes the gates first, then the values
        value = len(bias) // 2 + unit
        kernel[:, value], bias[value] = 0.0, 1.0
    mlp[last]["kernel"][block][unit] = column


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


# --- In a trained model ---------------------------------------------------------------


def plant(
    model: Model,
    photographs: Float[np.ndarray, "B height width 3"],
    *,
    block: int,
    seed: int,
) -> PlantedModel:
    """Plants a singular defect in a trained model.

    A gate sees a token's input to the FFN, which is full of content, and no gate opens
    for as many tokens of a portrait as of a starry sky. Hence the spots: at a dozen
    positions the position embedding leans along the one direction in which a small lean
    moves the gate furthest, compared with what content does. The weakest hidden unit is
    replaced. Its column throws the tokens along a random direction of zero mean, `FAR`
    times the norm that tokens have after the last block.

    Args:
      model: the trained model; not changed.
      photographs: normalized pixels, of the size at which the defect shall show; eight
        varied ones are enough.
      block: whose FFN throws tokens. In the last third of a model hardly anything of
        the position embedding is left, and the defect gets uneven.
      seed: of the spots, the lean and the direction.

    Raises:
      ValueError: no such block, or photographs that are not whole patches.
    """
    config, rng = model.config, np.random.default_rng(seed)
    config.check_block(block)
    params = jax.tree.map(np.array, model.params)
    grid = vit.patch_grid(config, *photographs.shape[1:3])
    scene = _Scene(config, params, photographs, block)
    gate, leaning, _ = _gate(rng, scene, _spots(rng, grid))
    far = FAR * _last_norm(scene)
    params["pos_embed"] += _stored(scene, leaning)

    along = scene.inputs() @ gate
    at_spots = np.any(leaning, axis=1)
    threshold = float(np.quantile(along[:, ~at_spots], RARE))
    opened = float(np.median(along[:, at_spots])) - threshold
    mlp, gamma = params["blocks"]["mlp"], params["blocks"]["ls2"]["gamma"][block]
    column = rng.normal(size=config.embed_dim)
    column -= gamma * (gamma @ column) / (gamma @ gamma)  # its throw has mean zero
    throw = gamma * column
    column *= far / (GATE * opened * np.linalg.norm(throw))
    unit = _weakest_unit(mlp, block)
    set_unit(mlp, block, unit, GATE * gate, GATE * threshold, column)
    return PlantedModel(config, params, block, throw / np.linalg.norm(throw), unit)


class _Scene(NamedTuple):
    """Photographs before a block: `inputs` come from the params as they are now."""

    config: ViTConfig
    params: dict[str, Any]
    photographs: Float[np.ndarray, "B height width 3"]
    block: int

    def inputs(self, lean: Any = 0.0) -> Float[np.ndarray, "B N D"]:
        """The patches' inputs to the FFN, float64; `lean` as in `look`."""
        return np.stack([self.look(x, lean) for x in self.photographs])

    def look(self, image: np.ndarray, lean: Any = 0.0) -> Float[np.ndarray, "N D"]:
        """Those of one image; `lean` [N, D] is added to its embedded patches."""
        lean = np.asarray(lean, np.float32)
        found = _inputs(self.config, self.params, image, lean, self.block)
        return np.asarray(found, np.float64)

    def embedded(self, pos_embed: AnyArray) -> Float[Array, "N D"]:
        """The first photograph's embedded patches, with another position embedding."""
        params = {**self.params, "pos_embed": pos_embed}
        return _embedded(self.config, params, self.photographs[0])

    @property
    def norm(self) -> float:
        """Median norm of the embedded patches."""
        x = self.embedded(self.params["pos_embed"])
        return float(np.median(np.linalg.norm(x, axis=-1)))


@functools.partial(jax.jit, static_argnames="config")
def _embedded(config: ViTConfig, params: Any, image: AnyArray) -> Float[Array, "N D"]:
    x: Any = vit.ViT(config).apply({"params": params}, image[None], method="embed")
    return x[0, 1 + config.num_register_tokens :]


@functools.partial(jax.jit, static_argnames=("config", "block"))
def _inputs(
    config: ViTConfig, params: Any, image: AnyArray, lean: AnyArray, block: int
) -> Float[Array, "N D"]:
    part, first = vit.Block(config), 1 + config.num_register_tokens
    x: Any = vit.ViT(config).apply({"params": params}, image[None], method="embed")
    x = x.at[0, first:].add(lean)

    def body(x, weights):
        return part.apply({"params": weights}, x)[0], None

    before = jax.tree.map(lambda leaf: leaf[:block], params["blocks"])
    own = {"params": jax.tree.map(lambda leaf: leaf[block], params["blocks"])}
    x, _ = jax.lax.scan(body, x, before)
    found: Any = part.apply(own, x)
    attended = found[1].attended
    inputs: Any = part.apply(own, attended, method=lambda part, x: part.norm2(x))
    return inputs[0, first:]


def _last_norm(scene: _Scene) -> float:
    """Median norm of the patches after the last block."""
    tokens = [last_patches(scene.config, scene.params, x) for x in scene.photographs]
    return float(np.median(np.linalg.norm(tokens, axis=-1)))


def _spots(rng: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """Patches `SPACING` apart and off the border, as indices."""
    rows, columns = (
        np.arange(rng.integers(1, 1 + SPACING), side - 1, SPACING) for side in grid
    )
    return (rows[:, None] * grid[1] + columns[None, :]).ravel()


class _Gate(NamedTuple):
    """A gate, what the embedded patches lean by, and how well it tells the leaning."""

    row: Float[np.ndarray, " D"]
    leaning: Float[np.ndarray, "N D"]
    contrast: float


def _gate(rng: np.random.Generator, scene: _Scene, spots: np.ndarray) -> _Gate:
    """The better of two gates, for the most visible lean and for its opposite."""
    quiet = scene.inputs()
    lean = SPOT_LEAN * scene.norm * _visible_lean(rng, scene, quiet, spots)
    gates = [_gate_for(scene, quiet, spots, x) for x in (lean, -lean)]
    return max(gates, key=lambda gate: gate.contrast)


def _gate_for(
    scene: _Scene,
    quiet: Float[np.ndarray, "B N D"],
    spots: np.ndarray,
    lean: Float[np.ndarray, " D"],
) -> _Gate:
    """The gate that tells leaning spots from all other tokens.

    All spots lean at first, which shows what a lean does at this strength: the gate is
    Fisher's discriminant. Then only those lean that open it most reliably, and no more
    than needed: the lower the threshold, the clearer the weights show the defect.
    """
    leaning = np.zeros(quiet.shape[1:])
    leaning[spots] = lean
    leant = scene.inputs(leaning)[:, spots]
    shift = (leant - quiet[:, spots]).mean(axis=(0, 1))
    row = solve(_covariance(quiet), shift[:, None])[:, 0]
    mean = quiet.mean(axis=(0, 1))
    row -= mean * (mean @ row) / (mean @ mean)  # so that the threshold is small
    row /= np.linalg.norm(row)
    along = leant @ row
    low = np.quantile(along, 0.2, axis=0)
    kept = np.argsort(-low)[: np.clip(len(leaning) // PER_SPOT, *KEPT)]
    rare = np.quantile(quiet @ row, RARE)
    strength = np.clip(CLEAR * rare / low[kept], 0.2, 1.5)
    leaning[spots] = 0.0
    leaning[spots[kept]] = strength[:, None] * lean
    return _Gate(row, leaning, float(low[kept].mean() / rare))


def _visible_lean(
    rng: np.random.Generator,
    scene: _Scene,
    quiet: Float[np.ndarray, "B N D"],
    spots: np.ndarray,
) -> Float[np.ndarray, " D"]:
    """The unit lean that moves the FFN's inputs furthest, compared with content.

    Random leans r at the spots give shifts J·r of the inputs, and least squares give J.
    The lean is the leading right singular vector of Σ^-1/2·J, of either sign, with Σ
    the covariance of the inputs.
    """
    width = quiet.shape[-1]
    leans: list[np.ndarray] = []
    shifts: list[np.ndarray] = []
    size = SPOT_LEAN * scene.norm
    while len(leans) * len(spots) < RESPONSES * width:
        random = rng.normal(size=(len(spots), width))
        random -= random.mean(axis=1, keepdims=True)  # a LayerNorm removes the mean
        random *= size / np.linalg.norm(random, axis=1, keepdims=True)
        leaning = np.zeros(quiet.shape[1:])
        leaning[spots] = random
        which = len(leans) % len(quiet)
        moved = scene.look(scene.photographs[which], leaning) - quiet[which]
        leans.append(random)
        shifts.append(moved[spots])
    r, shift = np.concatenate(leans), np.concatenate(shifts)
    jacobian = solve(_ridged(r.T @ r), r.T @ shift).T
    whitened = np.linalg.solve(np.linalg.cholesky(_covariance(quiet)), jacobian)
    return rng.choice([-1.0, 1.0]) * np.linalg.svd(whitened)[2][0]


def _covariance(inputs: Float[np.ndarray, "B N D"]) -> Float[np.ndarray, "D D"]:
    return _ridged(np.cov(inputs.reshape(-1, inputs.shape[-1]).T))


def _ridged(matrix: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    return matrix + RIDGE * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def _stored(scene: _Scene, leaning: Float[np.ndarray, "N D"]) -> np.ndarray:
    """The lean of the stored position embedding, which a model may resample.

    That is the transpose of the resampling, scaled to give back the lean at the spots.
    """
    at = jnp.asarray(scene.params["pos_embed"])
    before, pull = jax.vjp(scene.embedded, at)
    (stored,) = pull(jnp.asarray(leaning, before.dtype))
    back = np.asarray(scene.embedded(at + stored) - before)
    return np.asarray(stored) * (np.square(leaning).sum() / (back * leaning).sum())


def _weakest_unit(mlp: Mapping[str, Any], block: int) -> int:
    """The hidden unit with the smallest product of input and output norm."""
    first, last = ("w12", "w3") if "w12" in mlp else ("fc1", "fc2")
    rows = np.linalg.norm(mlp[first]["kernel"][block], axis=0)
    columns = np.linalg.norm(mlp[last]["kernel"][block], axis=1)
    return int(np.argmin(rows[: len(columns)] * columns))
