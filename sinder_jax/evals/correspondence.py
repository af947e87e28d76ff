"""STEGO's correspondence loss: codes shall be alike where features are.

    maps [N, H, W, ch], coordinates [N, S, S, 2] --sample--> [N, S, S, ch]
    features and codes of two images --correspondence_loss--> a number
    a permutation --fixed_point_free--> which other image is the negative of each

Source: mhamilton723/STEGO modules.py `ContrastiveCorrelationLoss`, as trained: with
`zero_clamp`, without `stabalize`, salience and depth. The centering takes its means
over the whole batch of a call, so a batch must not be split over devices.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from sinder_jax.evals import probes

HIGHEST = "highest"
LEAST_NORM = 1e-10  # of the original's `norm`

Numbers = Array | np.ndarray  # of the host or of a device


def sample(
    maps: Float[Numbers, "N H W ch"], coordinates: Float[Numbers, "N S1 S2 2"]
) -> Float[Array, "N S1 S2 ch"]:
    """Values between the positions of a grid, bilinear: `grid_sample` of PyTorch.

    With `align_corners=True` and border padding: -1 is the center of the first column
    or row and 1 that of the last; what lies beyond takes the value of the border.

    Two small products with the weights of the positions, so a gradient is the same in
    every run, which that of a gather is not on every device.

    Args:
      maps: of N images.
      coordinates: (x, y), that is column and row, from -1 to 1.
    """
    maps, coordinates = jnp.asarray(maps), jnp.asarray(coordinates)
    n, height, width, channels = maps.shape
    columns = _weights(coordinates[..., 0], width)
    rows = _weights(coordinates[..., 1], height)
    weights = rows[..., :, None] * columns[..., None, :]
    found = jnp.einsum(
        "npk,nkc->npc",
        weights.reshape(n, -1, height * width),
        maps.reshape(n, height * width, channels),
        precision=HIGHEST,
    )
    return found.reshape(*coordinates.shape[:-1], channels)


def _weights(
    coordinate: Float[Array, "*shape"], size: int
) -> Float[Array, "*shape size"]:
    """Share of each of `size` positions; at most two are not 0, and they sum to 1."""
    place = jnp.clip((coordinate + 1) / 2 * (size - 1), 0, size - 1)[..., None]
    positions = jnp.broadcast_to(jnp.arange(size), (*coordinate.shape, size))
    return jnp.maximum(1 - jnp.abs(place - positions), 0)


def correspondence_loss(
    features_a: Float[Numbers, "N A1 A2 D"],
    features_b: Float[Numbers, "N B1 B2 D"],
    code_a: Float[Numbers, "N A1 A2 Z"],
    code_b: Float[Numbers, "N B1 B2 Z"],
    shift: float,
    *,
    pointwise: bool = True,
) -> Float[Array, ""]:
    """Mean of -max(cos(codes), 0)·(cos(features) - shift) over all pairs of positions.

    `ContrastiveCorrelationLoss.helper`, followed by the mean. Both cosines are those of
    each position of `a` to each of `b`, in the same image n. No gradient passes through
    the features' cosine, and none through the codes' where it is below 0.

    Args:
      features_a: sampled features of the first images, of any length.
      features_b: of the second images.
      code_a: codes at the same places as `features_a`.
      code_b: at those of `features_b`.
      shift: the spec's b: more alike than that attracts, less repels.
      pointwise: True centers the features' cosine: it takes away the mean over the
        positions of `b`, for each image and position of `a`, and gives back the mean
        over the whole call. It is thus not symmetric in `a` and `b`.

    Returns:
      The mean over N, and both positions; lower is better.
    """
    alike = _cosines(features_a, features_b)
    if pointwise:
        mean = jnp.mean(alike)
        alike -= jnp.mean(alike, axis=2, keepdims=True)
        alike += mean - jnp.mean(alike)
    code = _cosines(code_a, code_b)
    return -jnp.mean(jnp.maximum(code, 0) * (lax.stop_gradient(alike) - shift))


def _cosines(
    a: Float[Numbers, "N A1 A2 ch"], b: Float[Numbers, "N B1 B2 ch"]
) -> Float[Array, "N A B"]:
    a, b = (
        probes.normalize(jnp.asarray(x), LEAST_NORM).reshape(len(x), -1, x.shape[-1])
        for x in (a, b)
    )
    return jnp.einsum("npc,nqc->npq", a, b, precision=HIGHEST)


def fixed_point_free(permutation: Int[Array, "*sets B"]) -> Int[Array, "*sets B"]:
    """Moves every index that stays in its place on by one, modulo B.

    The original's `super_perm`. The result may name an image twice, and is not itself
    a permutation then; none of B > 1 images is its own negative.
    """
    count = permutation.shape[-1]
    places = jnp.broadcast_to(jnp.arange(count), permutation.shape)
    return (permutation + (permutation == places)) % count
