"""The linear map of each block, its running product and the singular defect directions.

    block's params --attention_map A, ffn_map M--> block_map E = M·A   (section 2)
    E_0, E_1, ... --running product G_i = E_i·…·E_0--> leading left singular vectors

A linear map is the matrix [D, D] that multiplies a column. Everything is NumPy float64
on the host: a product of 40 block maps amplifies rounding, and none of this is repeated
during a repair.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sinder_jax import kernels, linalg
from sinder_jax.kernels import BlockWeights
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

METHODS = ("analytic", "monte_carlo")
SQRT_2PI = np.sqrt(2 * np.pi)
QUADRATURE = np.linspace(-9.0, 9.0, 1025)  # standard deviations; relative error < 1e-13
PROBES_PER_CHUNK = 8_192


class SingularDefects(NamedTuple):
    """Singular defects of the running products G_0 … G_{L-1}; float64.

    Attributes:
      directions: leading left singular vector of each G_i; unit rows, any sign.
      log_values: natural logarithms of the two leading singular values of each G_i,
        because a product of 40 blocks can overflow. The second is exact to
        1e-16 (σ0/σ1)², since it is read off G·Gᵀ.
    """

    directions: Float[np.ndarray, "L D"]
    log_values: Float[np.ndarray, "L _"]

    @property
    def gaps(self) -> Float[np.ndarray, " L"]:
        """σ0/σ1 of each G_i: near 1 the direction is not determined."""
        return np.exp(self.log_values[:, 0] - self.log_values[:, -1])


def singular_defect_directions(
    config: ViTConfig,
    params: Params,
    method: str = "analytic",
    *,
    key: Array | None = None,
    num_probes: int = 100_000,
) -> Float[Array, "L D"]:
    """The singular defect direction of every block: unit rows, of arbitrary sign.

    Arguments and errors as for `singular_defects`, which also returns the leading
    singular values.
    """
    found = singular_defects(config, params, method, key=key, num_probes=num_probes)
    return jnp.asarray(found.directions, jnp.float32)


def singular_defects(
    config: ViTConfig,
    params: Params,
    method: str = "analytic",
    *,
    key: Array | None = None,
    num_probes: int = 100_000,
    progress: linalg.Progress | None = None,
) -> SingularDefects:
    """Directions and leading singular values of the running products of block maps.

    Args:
      config: the architecture.
      params: the params tree.
      method: "analytic" takes the exact linear fit of each FFN; "monte_carlo" fits
        it to random probes as the authors do (`anomaly_dir_mlp_ls` of their code) and
        agrees to about 1/√num_probes.
      key: random key of the probes; None means `jax.random.key(0)`.
      num_probes: probes per block, at least D.
      progress: called after each block.

    Raises:
      ValueError: an unknown method, or fewer probes than D.
    """

    def map_of(block: int) -> np.ndarray:
        return block_map(config, params, block, method, key=key, num_probes=num_probes)

    return of_maps(map_of, config.depth, min(2, config.embed_dim), progress)


def of_maps(
    map_of: Callable[[int], Float[np.ndarray, "D D"]],
    depth: int,
    count: int = 2,
    progress: linalg.Progress | None = None,
) -> SingularDefects:
    """`singular_defects` of any maps; arguments as for `linalg.running_triplets`."""
    directions, log_values = [], []
    for triplets, log_scale in linalg.running_triplets(map_of, depth, count, progress):
        directions.append(triplets.u[:, 0])
        log_values.append(log_scale + np.log(np.maximum(triplets.s, linalg.TINY)))
    return SingularDefects(np.stack(directions), np.stack(log_values))


# --- Maps of a block ------------------------------------------------------------------


def block_map(
    config: ViTConfig,
    params: Params,
    block: int,
    method: str = "analytic",
    **probes: Any,
) -> Float[np.ndarray, "D D"]:
    """E = M·A, the linear approximation of a block (section 2); float64.

    Arguments and errors as for `singular_defects`; `block` counts from 0.
    """
    weights = kernels.weights(config, params, block)
    return ffn_map(weights, method, **probes) @ attention_map(weights)


def attention_map(weights: BlockWeights) -> Float[np.ndarray, "D D"]:
    """A = I + diag(γ1)·W_proj·W_v·diag(g1)·C: attention when all tokens are equal.

    Returns:
      float64, without the constant part.
    """
    through = weights.proj @ (weights.v * weights.scale1[None, :])
    return _with_residual(through, weights.gamma1)


def ffn_map(
    weights: BlockWeights,
    method: str = "analytic",
    *,
    key: Array | None = None,
    num_probes: int = 100_000,
) -> Float[np.ndarray, "D D"]:
    """M = I + diag(γ2)·W_out·J·diag(g2)·C, with J the linear fit of the hidden layer.

    J is the least-squares fit without intercept of the hidden layer, biases included,
    to x ~ N(0, I). Options and errors as for `singular_defects`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "analytic":
        fit = hidden_fit(weights.ffn_layer, weights.first, weights.bias)
    else:
        key = jax.random.key(0) if key is None else key
        fit = _fit_hidden(weights, jax.random.fold_in(key, weights.block), num_probes)
    through = weights.last @ fit * weights.scale2[None, :]
    return _with_residual(through, weights.gamma2)


def _with_residual(
    through: Float[np.ndarray, "D D"], gamma: Float[np.ndarray, " D"]
) -> Float[np.ndarray, "D D"]:
    """I + diag(γ)·through·C, with the centering C = I − 1/D·11ᵀ of the LayerNorm."""
    centered = through - through.mean(axis=1, keepdims=True)
    return np.eye(len(gamma)) + gamma[:, None] * centered


# --- The linear fit J of a hidden layer: exactly, by Stein's lemma E[∂h/∂x] -----------


def hidden_fit(
    ffn_layer: str,
    weight: Float[np.ndarray, "up D"],
    bias: Float[np.ndarray, " up"],
) -> Float[np.ndarray, "F D"]:
    """J of a hidden layer; arguments as for `hidden_slopes`."""
    slopes = hidden_slopes(ffn_layer, weight, bias)
    parts = zip(slopes, np.split(weight, len(slopes)), strict=True)
    return np.sum([slope[:, None] * rows for slope, rows in parts], axis=0)


def hidden_slopes(
    ffn_layer: str,
    weight: Float[np.ndarray, "up D"],
    bias: Float[np.ndarray, " up"],
) -> Float[np.ndarray, "parts F"]:
    """The factors by which J multiplies the rows of the first FFN kernel.

    A row of J is slope·w for GELU (one part) and slope1·w1 + slope2·w2 for SwiGLU (gate
    and value).

    Args:
      ffn_layer: "mlp" or "swiglu".
      weight: of fc1 or w12, as it multiplies a column; the rows of w12 are those of all
        gates, then those of all values.
      bias: likewise.
    """
    return (_swiglu_slopes if ffn_layer == "swiglu" else _gelu_slopes)(weight, bias)


def _gelu_slopes(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """E[GELU'(a)] of h = GELU(a), a = W·x + b, x ~ N(0, I).

    With a ~ N(b, v), v = ‖w‖² and t = b/√(1+v):
    E[GELU'(a)] = Φ(t) + φ(t)·b/(1+v)^{3/2}.
    """
    from scipy import special  # here: it takes long to import

    spread = 1 + np.sum(weight**2, axis=1)
    t = bias / np.sqrt(spread)
    density = np.exp(-(t**2) / 2) / SQRT_2PI
    return (special.ndtr(t) + density * bias / spread**1.5)[None]


def _swiglu_slopes(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """E[silu'(a)·E[c|a]] and E[silu(a)] of h = silu(a)·c, (a, c) = W12·x + b12.

    x ~ N(0, I), so E[c|a] is linear in a with slope w1·w2/‖w1‖². One-dimensional
    integrals by the trapezoidal rule over ±9 standard deviations; w1 = 0 makes a
    constant.
    """
    from scipy import special  # here: it takes long to import

    w1, w2 = np.split(weight, 2)
    b1, b2 = np.split(bias, 2)
    variance = np.sum(w1**2, axis=1)
    slope = np.sum(w1 * w2, axis=1) / np.where(variance > 0, variance, 1.0)
    density = np.exp(-(QUADRATURE**2) / 2) / SQRT_2PI
    density = density * (QUADRATURE[1] - QUADRATURE[0])
    deviation = np.sqrt(variance)[:, None] * QUADRATURE[None, :]
    a = b1[:, None] + deviation
    c = b2[:, None] + slope[:, None] * deviation
    gate = special.expit(a)
    silu, dsilu = a * gate, gate * (1 + a * (1 - gate))
    return np.stack([(dsilu * c) @ density, silu @ density])


# --- The same fit by random probes, the authors' way ----------------------------------


def _fit_hidden(
    weights: BlockWeights, key: Array, num_probes: int
) -> Float[np.ndarray, "F D"]:
    """Least squares h ≈ J·x over random probes; normal equations in float64."""
    width = len(weights.v)
    if num_probes < width:
        raise ValueError(
            f"num_probes={num_probes} probes do not determine a fit of width {width}; "
            f"use at least {width} (the authors use 100,000)"
        )
    layer = (jnp.asarray(x, jnp.float32) for x in (weights.first, weights.bias))
    moments_of = functools.partial(_probe_moments, weights.ffn_layer, *layer)
    covariance: np.ndarray = np.zeros(())
    moments: np.ndarray = np.zeros(())
    for chunk, start in enumerate(range(0, num_probes, PROBES_PER_CHUNK)):
        size = min(PROBES_PER_CHUNK, num_probes - start)
        x = jax.random.normal(jax.random.fold_in(key, chunk), (size, width))
        xx, xh = moments_of(x)
        covariance = covariance + np.asarray(xx, np.float64)
        moments = moments + np.asarray(xh, np.float64)
    return linalg.solve(covariance, moments).T


@functools.partial(jax.jit, static_argnums=0)
def _probe_moments(
    ffn_layer: str, weight: Array, bias: Array, x: Array
) -> tuple[Array, Array]:
    """xᵀx [D, D] and xᵀh [D, F] of a chunk of probes."""
    with jax.default_matmul_precision("highest"):
        hidden = x @ weight.T + bias[None, :]
        if ffn_layer == "swiglu":
            gate, value = jnp.split(hidden, 2, axis=-1)
            hidden = jax.nn.silu(gate) * value
        else:
            hidden = jax.nn.gelu(hidden, approximate=False)
        return x.T @ x, x.T @ hidden
