"""STEGO: unsupervised segmentation by a small head on frozen features.

    pooled features [n, D] --nearest--> the images most like each: its positives
    features of images and of a positive each --make_step--> the head, by the
        correspondence loss; on its detached codes a linear and a cluster probe
    features [B, h, w, D] --codes--> [B, h, w, Z], for `evals.probes`

Source: mhamilton723/STEGO, train_segmentation.py and modules.py; weights and shifts are
SINDER's, Table 7. Left out is what its configuration switches off. Where the sources
leave something open: Z is 70; batch statistics are those of one GPU; the neighbors come
from features without dropout, which the original forgets to switch off there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, Integer, UInt32

from sinder_jax.evals import correspondence, knn, probes
from sinder_jax.evals.correspondence import correspondence_loss, sample
from sinder_jax.evals.probes import Linear

DIM = 70  # Z
DROPOUT = 0.1  # share of the channels
SAMPLES = 11  # S; a step compares S x S places of an image
MOST_SAMPLES = 64  # a step of 16 images compares 16 S⁴ pairs at once: 1 GB
NEGATIVES = 5  # of each image and step
NEIGHBORS = 30  # kept of each image, itself included
POSITIVES = range(1, 8)  # of these, from which the positive is drawn
ALPHA = 2.0  # of the cluster probe
HIGHEST = "highest"


# --- Table 7 --------------------------------------------------------------------------


class Row(NamedTuple):
    """Weights and shifts of the three terms of the loss.

    Attributes:
      weights: of negatives, of the positives ("pos inter"), of an image with itself
        ("pos intra").
      shifts: b of the same.
    """

    weights: tuple[float, float, float]
    shifts: tuple[float, float, float]


BACKBONES = ("dinov2", "dinov2_reg", "sinder")
TABLE: Mapping[tuple[str, str], Row] = {
    ("cityscapes", "dinov2"): Row((0.90, 0.60, 1.00), (0.30, 0.20, 0.45)),
    ("cityscapes", "dinov2_reg"): Row((0.80, 0.65, 0.90), (0.30, 0.20, 0.45)),
    ("cityscapes", "sinder"): Row((0.80, 0.65, 0.90), (0.30, 0.45, 0.60)),
    ("potsdam3", "dinov2"): Row((0.90, 0.60, 1.00), (0.30, 0.20, 0.45)),
    ("potsdam3", "dinov2_reg"): Row((0.90, 0.60, 1.00), (0.30, 0.20, 0.45)),
    ("potsdam3", "sinder"): Row((0.90, 0.60, 1.00), (0.40, 0.45, 0.45)),
}
"""SINDER's Table 7, by data set and backbone."""


@dataclasses.dataclass(frozen=True)
class StegoOptions:
    """How head and probes are trained; the defaults are the original's.

    Attributes:
      row: weights and shifts of the loss.
      lr: Adam's learning rate of the head, constant.
      probe_lr: of both probes.
      dropout: share of the channels that each of three dropouts of an image sets to 0.
      samples: S.
      negatives: of each image.
      pointwise: as for `correspondence_loss`.

    Raises:
      ValueError: an option out of range.
    """

    row: Row
    lr: float = 5e-4
    probe_lr: float = 5e-3
    dropout: float = DROPOUT
    samples: int = SAMPLES
    negatives: int = NEGATIVES
    pointwise: bool = True

    def __post_init__(self):
        numbers = [*self.row.weights, *self.row.shifts]
        finite = len(numbers) == 6 and all(map(math.isfinite, numbers))
        rules = {
            "row": (
                finite and min(self.row.weights) >= 0,
                "three finite weights, at least 0, and three finite shifts",
            ),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "probe_lr": (0 < self.probe_lr < math.inf, "above 0"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "samples": (
                1 <= self.samples <= MOST_SAMPLES,
                f"at least 1 and at most {MOST_SAMPLES}",
            ),
            "negatives": (self.negatives >= 1, "at least 1"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(
                    f"got {name}={getattr(self, name)}, must be {expected}"
                )


# --- Positives ------------------------------------------------------------------------


def nearest(
    pooled: Float[np.ndarray, "n D"], count: int = NEIGHBORS
) -> Int32[np.ndarray, "n count"]:
    """The images most like each by the cosine of their mean features, most alike first.

    precompute_knns.py of the original; exact, in tiles. The first is the image itself,
    unless another one has the same features.

    Args:
      pooled: features of each image, the mean over its patches; without dropout.
      count: images to keep, fewer if there are fewer.

    Raises:
      ValueError: features that are not finite.
    """
    return knn.neighbors(pooled, pooled, min(count, len(pooled))).rows


# --- The head and the probes ----------------------------------------------------------


class Head(NamedTuple):
    """Trained projection D -> Z: a linear layer plus two with a ReLU between them."""

    linear: Linear
    hidden: Linear
    output: Linear


class Params(NamedTuple):
    """All that a step trains.

    Attributes:
      head: features -> codes; by the correspondence loss.
      linear: codes -> classes; by the labels.
      centroids: of the clusters; by the cosine to the nearest code.
    """

    head: Head
    linear: Linear
    centroids: Float[Array, "C Z"]


class StegoState(NamedTuple):
    """What training changes.

    Attributes:
      params: of head and probes.
      adam: of all three optimizers; Adam treats each number alone.
      key: data of the random key. Step k draws from it and k alone.
    """

    params: Params
    adam: optax.ScaleByAdamState
    key: UInt32[Array, " _"]


def init(key: Array, dim: int, num_classes: int, code_dim: int = DIM) -> StegoState:
    """Head and probes before the first step.

    Layers start as PyTorch's convolutions, biases too; centroids as N(0, 1).

    Args:
      key: random key, of the start and of all draws of the training.
      dim: D, width of the features.
      num_classes: C, of labels and of clusters, 2 to 255.
      code_dim: Z.

    Raises:
      ValueError: a number out of range.
    """
    if dim < 1:
        raise ValueError(f"got features of width {dim}, expected at least 1")
    keys = jax.random.split(key, 6)
    params = Params(
        head=Head(
            _layer(keys[0], dim, code_dim),
            _layer(keys[1], dim, dim),
            _layer(keys[2], dim, code_dim),
        ),
        linear=probes.init_linear(keys[3], code_dim, num_classes),
        centroids=jax.random.normal(keys[4], (num_classes, code_dim)),
    )
    adam = optax.scale_by_adam().init(params)
    assert isinstance(adam, optax.ScaleByAdamState)
    return StegoState(params, adam, jax.random.key_data(keys[5]))


def _layer(key: Array, inputs: int, outputs: int) -> Linear:
    kernel, bias = jax.random.split(key)
    return Linear(
        probes.uniform(kernel, (inputs, outputs), inputs),
        probes.uniform(bias, (outputs,), inputs),
    )


def _apply(layer: Linear, x: Float[Array, "B h w in"]) -> Float[Array, "B h w out"]:
    y = jnp.matmul(x, layer.kernel, precision=HIGHEST)
    return y + layer.bias[None, None, None]


def _project(
    head: Head, first: Float[Array, "B h w D"], second: Float[Array, "B h w D"]
) -> Float[Array, "B h w Z"]:
    """`DinoFeaturizer.forward`; the layers see different dropouts of the features."""
    hidden = jax.nn.relu(_apply(head.hidden, second))
    return _apply(head.linear, first) + _apply(head.output, hidden)


@jax.jit
def codes(head: Head, features: Float[Array, "B h w D"]) -> Float[Array, "B h w Z"]:
    """Codes of patches as for an evaluation: without dropout."""
    return _project(head, features, features)


# --- Training -------------------------------------------------------------------------


class Draws(NamedTuple):
    """All that is random in a step; index 0 is of the images, 1 of their positives.

    Attributes:
      kept: channels that the dropouts keep: before the linear layer, before the hidden
        one, and of the features that the loss compares.
      coordinates: where maps are sampled, (x, y) in [-1, 1); the first of an image and
        its codes, the second of the positives and of all negatives.
      negatives: which image of the batch is compared with each.
    """

    kept: Bool[Array, "2 3 B D"]
    coordinates: Float[Array, "2 B S S 2"]
    negatives: Int[Array, "negatives B"]


class Losses(NamedTuple):
    """Terms of a step's loss, before their weights, and their weighted sum."""

    negative: Float[Array, ""]
    inter: Float[Array, ""]
    intra: Float[Array, ""]
    linear: Float[Array, ""]
    cluster: Float[Array, ""]
    total: Float[Array, ""]


def draw(key: Array, batch: int, dim: int, options: StegoOptions) -> Draws:
    """Draws what is random in a step.

    Args:
      key: of this step.
      batch: images.
      dim: channels of the features.
      options: of the training.
    """
    dropout, places, negatives = jax.random.split(key, 3)
    shape = (2, batch, options.samples, options.samples, 2)
    permutations = jax.vmap(lambda k: jax.random.permutation(k, batch))(
        jax.random.split(negatives, options.negatives)
    )
    return Draws(
        jax.random.bernoulli(dropout, 1 - options.dropout, (2, 3, batch, dim)),
        jax.random.uniform(places, shape, minval=-1, maxval=1),
        correspondence.fixed_point_free(permutations),
    )


def losses(
    params: Params,
    draws: Draws,
    features: Float[Array, "2 B h w D"],
    labels: Integer[Array, "B height width"],
    options: StegoOptions,
) -> tuple[Float[Array, ""], Losses]:
    """The loss of a step, to be differentiated, and its terms.

    Probes are trained on the codes of the images with dropout in the head; no gradient
    of theirs reaches the head.

    Args:
      params: of head and probes.
      draws: of the step.
      features: of the images, then of their positives, without dropout.
      labels: of the images; below 0 or of C and above is ignored.
      options: of the training.
    """
    scales = draws.kept / (1 - options.dropout)
    code, code_pos = (
        _project(params.head, *(x[None] * scale[:2, :, None, None]))
        for x, scale in zip(features, scales, strict=True)
    )
    terms = _correspondences(draws, scales[:, 2], features, (code, code_pos), options)
    detached = lax.stop_gradient(code)
    linear = probes.linear_loss(params.linear, detached, labels)
    cluster = cluster_loss(detached, params.centroids)
    total = linear + cluster
    for weight, term in zip(options.row.weights, terms, strict=True):
        total += weight * term
    return total, Losses(*terms, linear, cluster, total)


def _correspondences(
    draws: Draws,
    scales: Float[Array, "2 B D"],
    features: Float[Array, "2 B h w D"],
    code: tuple[Array, Array],
    options: StegoOptions,
) -> tuple[Array, Array, Array]:
    """Loss of the negatives, of the positives, and of the images with themselves.

    Dropping channels after sampling is the same as before, and touches fewer numbers.
    """
    here, there = draws.coordinates

    def sampled(which: int, places: Array, order: Any = slice(None)) -> Any:
        """Features and codes of images or positives, in an order."""
        scale = scales[which][order][:, None, None]
        return sample(features[which][order], places) * scale, sample(
            code[which][order], places
        )

    def compared(one: Any, other: Any, shift: float) -> Array:
        return correspondence_loss(
            one[0], other[0], one[1], other[1], shift, pointwise=options.pointwise
        )

    image, positive = sampled(0, here), sampled(1, there)
    negative, inter, intra = options.row.shifts
    negatives = lax.map(
        lambda order: compared(image, sampled(0, there, order), negative),
        draws.negatives,
    )
    return (
        jnp.mean(negatives),
        compared(image, positive, inter),
        compared(image, image, intra),
    )


def cluster_loss(
    codes: Float[Array, "*shape Z"], centroids: Float[Array, "C Z"]
) -> Float[Array, ""]:
    """-mean of the cosine to the nearest centroid, `ClusterLookup` with hard choice."""
    return -jnp.mean(jnp.max(probes.cosines(codes, centroids), axis=-1))


Step = Callable[..., tuple[StegoState, Losses]]


def make_step(options: StegoOptions) -> Step:
    """Makes one step: `state, losses = step(state, features, positives, labels)`.

    One gradient of the sum of the losses, and three Adams. Everything random is drawn
    from the state's key and the number of its step. The centering of the loss takes
    means over the whole batch, so a step runs on one device.

    Args:
      options: see `StegoOptions`.

    Returns:
      A function of the state, features [B, h, w, D] of images and of a positive each,
      and integer labels [B, height, width] of the images; the losses are those before
      the update. Raises ValueError for arrays that do not go together, or not with the
      head.
    """

    def step(
        state: StegoState, features: Any, positives: Any, labels: Any
    ) -> tuple[StegoState, Losses]:
        _check(state, features, positives, labels)
        return compiled_step(options, state, features, positives, labels)

    return step


def _check(state: StegoState, features: Any, positives: Any, labels: Any) -> None:
    dim = len(state.params.head.hidden.kernel)
    if features.ndim != 4 or features.shape[-1] != dim:
        raise ValueError(
            f"got features {features.shape}, expected [B, h, w, {dim}] as the head was "
            "made for"
        )
    if positives.shape != features.shape:
        raise ValueError(
            f"got positives {positives.shape}, expected the {features.shape} of the "
            "images"
        )
    if labels.ndim != 3 or len(labels) != len(features):
        raise ValueError(
            f"got labels {labels.shape} for {len(features)} images, expected "
            f"[{len(features)}, height, width]"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"got labels of {labels.dtype}, expected integers")
    if len(features) < 2:
        raise ValueError("got 1 image, expected at least 2: negatives are other images")


@functools.partial(jax.jit, static_argnums=0)
def compiled_step(
    options: StegoOptions, state: StegoState, images: Any, positives: Any, labels: Any
) -> tuple[StegoState, Losses]:
    """The step without its checks, for those who ask for its memory."""
    features = jnp.stack([images, positives]).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.adam.count)
    draws = draw(key, len(images), images.shape[-1], options)
    gradient, found = jax.grad(losses, has_aux=True)(
        state.params, draws, features, jnp.asarray(labels), options
    )
    direction, adam = optax.scale_by_adam().update(gradient, state.adam)
    rates = (options.lr, options.probe_lr, options.probe_lr)
    params = Params(
        *(
            jax.tree.map(lambda w, d, rate=rate: w - rate * d, *both)
            for rate, *both in zip(rates, state.params, direction, strict=True)
        )
    )
    return state._replace(params=params, adam=adam), found
