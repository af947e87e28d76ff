"""CAUSE-TR: unsupervised segmentation by a codebook, a contrast and clusters.

    features --make_codebook_step--> codebook                           1 mediator
    features, codebook --front_door--> teacher's head, linear probe     2 front door
    features, head, probe --make_fine_tuning_step--> clusters, probe    3 fine-tuning
    features, head --codes--> codes [B, H, W, 90], to be compared with the clusters

Source: ByungKwanLee/Causal-Unsupervised-Segmentation, train_mediator.py,
train_front_door_tr.py, fine_tuning_tr.py and test_tr.py. Deviations: float32 where the
original runs in float16 with loss scaling; images without positive pairs are left out
where its scaler skips the step; the teacher is a copy from the first step on, where the
original's shares the student's memory until the first update.

A step's random numbers depend on its key alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from sinder_jax.evals import cause_head, modularity, probes
from sinder_jax.evals.cause_head import Head
from sinder_jax.evals.cause_optimizer import Moments, Options, moments_of, update
from sinder_jax.evals.modularity import draw_order, modularity_loss, sample_cells
from sinder_jax.evals.probes import Linear

__all__ = ["modularity_loss"]  # by contract; the rest is defined here

ALPHA = 3.0  # sharpness of the clusters' probabilities at test

Features = Float[Array, "B H W D"]
Labels = Integer[Array, "B height width"]


# --- 1: codebook ----------------------------------------------------------------------


class CodebookState(NamedTuple):
    """Code vectors [K, D], and Adam's moments."""

    codebook: Float[Array, "K D"]
    moments: Moments


def init_codebook(key: Array, codes: int, dim: int) -> CodebookState:
    """Code vectors from U(±1/codes)."""
    codebook = modularity.init_codebook(key, codes, dim)
    return CodebookState(codebook, moments_of(codebook))


CodebookStep = Callable[
    [CodebookState, Array, Array], tuple[CodebookState, Float[Array, ""]]
]


def make_codebook_step(options: Options) -> CodebookStep:
    """Makes `state, loss = step(state, features, key)`; donates the state.

    Args:
      options: of the optimizer; the original's have neither decay nor clipping.

    Returns:
      A jitted function of the state, features [B, H, W, D] of the frozen model after
      its final norm, and a key. The loss is that before the update.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: CodebookState, features: Features, key: Array
    ) -> tuple[CodebookState, Float[Array, ""]]:
        x = sample_cells(features, draw_order(key, *features.shape[:3]))
        loss, gradient = jax.value_and_grad(modularity_loss, argnums=1)(
            x, state.codebook
        )
        codebook, moments = update(state.codebook, gradient, state.moments, options)
        return CodebookState(codebook, moments), loss

    return step


# --- 3: fine-tuning -------------------------------------------------------------------


class FineTuned(NamedTuple):
    """Parameters of the third stage.

    Attributes:
      head: the teacher's.
      linear: probe.
      clusters: vectors [C, reduced], to which a code belongs by cosine.
    """

    head: Head
    linear: Linear
    clusters: Float[Array, "C reduced"]


class FineTuningState(NamedTuple):
    """What the third stage changes.

    Attributes:
      params: of which the head moves with the label leak only.
      moments: Adam's, of (head, linear) with the leak, else of linear.
      cluster_moments: of the clusters.
    """

    params: FineTuned
    moments: Moments
    cluster_moments: Moments


def init_fine_tuning(
    key: Array, head: Head, linear: Linear, *, label_leak: bool = False
) -> FineTuningState:
    """New clusters from U(±1/C); head and probe of the second stage.

    Args:
      key: random key.
      head: the teacher's.
      linear: probe of C classes.
      label_leak: as for `make_fine_tuning_step`.
    """
    reduced, num_classes = linear.kernel.shape
    clusters = modularity.init_codebook(key, num_classes, reduced)
    params = FineTuned(head, linear, clusters)
    return FineTuningState(
        params, moments_of(_supervised(params, label_leak)), moments_of(clusters)
    )


def _supervised(params: FineTuned, label_leak: bool) -> Any:
    """The parameters that the labels move."""
    return (params.head, params.linear) if label_leak else (params.linear,)


def fine_tuning_losses(
    params: FineTuned,
    codebook: Float[Array, "K D"],
    features: Features,
    labels: Labels,
    key: Array,
    *,
    label_leak: bool = False,
) -> Float[Array, "2"]:
    """The modularity loss of the clusters, and the probe's cross entropy.

    Dropout is active in the head.

    Args:
      params: of this stage.
      codebook: frozen, of the first one.
      features: tokens.
      labels: classes of pixels; others do not count.
      key: of sampling and dropout.
      label_leak: True to let the cross entropy's gradient reach the head, as the
        released fine_tuning_tr.py does: it neither freezes the head nor detaches its
        codes, so labels train the head of the "unsupervised" clusters.
    """
    of_order, of_head = jax.random.split(key)
    quantized, _ = modularity.quantize(features, codebook)
    z = cause_head.apply(params.head, features, quantized, key=of_head)
    x = sample_cells(z, draw_order(of_order, *features.shape[:3]))
    split = modularity_loss(x, params.clusters)
    seen = z if label_leak else lax.stop_gradient(z)
    return jnp.stack([split, probes.linear_loss(params.linear, seen, labels)])


FineTuningStep = Callable[
    [FineTuningState, Array, Array, Array], tuple[FineTuningState, Float[Array, "2"]]
]


def make_fine_tuning_step(
    codebook: Float[Array, "K D"], options: Options, *, label_leak: bool = False
) -> FineTuningStep:
    """Makes `state, losses = step(state, features, labels, key)`; donates the state.

    Args:
      codebook: frozen, of the first stage.
      options: of both optimizers.
      label_leak: as for `fine_tuning_losses`. False: the head stays as it is.

    Returns:
      A jitted function as that of `front_door.make_step`; the losses are those of
      `fine_tuning_losses`.
    """
    step = jax.jit(
        _fine_tuning_step, donate_argnums=0, static_argnames=("options", "label_leak")
    )
    return lambda state, *batch: step(
        state, codebook, *batch, options=options, label_leak=label_leak
    )


def _fine_tuning_step(
    state: FineTuningState,
    codebook: Float[Array, "K D"],
    features: Features,
    labels: Labels,
    key: Array,
    *,
    options: Options,
    label_leak: bool,
) -> tuple[FineTuningState, Float[Array, "2"]]:
    def loss(params: FineTuned) -> tuple[Array, Array]:
        losses = fine_tuning_losses(
            params, codebook, features, labels, key, label_leak=label_leak
        )
        return jnp.sum(losses), losses

    params = state.params
    slopes, losses = jax.grad(loss, has_aux=True)(params)
    supervised, moments = update(
        _supervised(params, label_leak),
        _supervised(slopes, label_leak),
        state.moments,
        options,
    )
    clusters, cluster_moments = update(
        params.clusters, slopes.clusters, state.cluster_moments, options.for_vectors()
    )
    head = supervised[0] if label_leak else params.head
    moved = FineTuned(head, supervised[-1], clusters)
    return FineTuningState(moved, moments, cluster_moments), losses


# --- Test -----------------------------------------------------------------------------


@jax.jit
def codes(
    head: Head, codebook: Float[Array, "K D"], features: Features
) -> Float[Array, "B H W reduced"]:
    """Codes without dropout, to be compared with the clusters, by `ALPHA` · cosine."""
    quantized, _ = modularity.quantize(features, codebook)
    return cause_head.apply(head, features, quantized)
