"""CAUSE's optimizer: Adam with L2 in the gradients, after clipping, as PyTorch's.

gradients --clip, + weight_decay · params, Adam--> params, moments
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

_adam = optax.scale_by_adam()


class Moments(NamedTuple):
    """Adam's state: optax's `ScaleByAdamState`.

    Attributes:
      steps: taken so far, int32.
      first, second: moments of each parameter.
    """

    steps: Int[Array, ""]
    first: Any
    second: Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Adam (0.9, 0.999) of one stage.

    Attributes:
      lr: learning rate; the originals' 1e-3 times the number of processes.
      weight_decay: times the parameters is added to the clipped gradients: L2 as of
        PyTorch's Adam, not AdamW's.
      clip: largest global norm of the gradients; 0: any.
      halve_every: steps after which the learning rate is halved, again and again; 0:
        constant.

    Raises:
      ValueError: an option out of range.
    """

    lr: float = 4e-3
    weight_decay: float = 0.0
    clip: float = 0.0
    halve_every: int = 0

    def for_vectors(self) -> "Options":
        """Those of the clusters: neither decay nor clipping."""
        return dataclasses.replace(self, weight_decay=0.0, clip=0.0)

    def __post_init__(self):
        rules = {
            "lr": (0 < self.lr < math.inf, "above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "clip": (0 <= self.clip < math.inf, "at least 0"),
            "halve_every": (self.halve_every >= 0, "at least 0"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(
                    f"got {name}={getattr(self, name)}, must be {expected}"
                )


def moments_of(params: Any) -> Moments:
    """Adam's state before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Moments(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))


def update(
    params: Any, gradients: Any, moments: Moments, options: Options
) -> tuple[Any, Moments]:
    """Takes one step.

    Args:
      params: a pytree of arrays.
      gradients: likewise.
      moments: of the steps before, which are counted there.
      options: of the optimizer.

    Returns:
      Parameters and moments after the step.
    """
    if options.clip:
        # `clip_grad_norm_` divides by slightly more than the norm.
        share = options.clip / (optax.tree.norm(gradients) + 1e-6)
        gradients = jax.tree.map(lambda g: g * jnp.minimum(share, 1), gradients)
    gradients = jax.tree.map(
        lambda g, p: g + options.weight_decay * p, gradients, params
    )
    rate: Any = options.lr
    if options.halve_every:
        rate = rate * 0.5 ** (moments.steps // options.halve_every)
    steps, after = _adam.update(gradients, optax.ScaleByAdamState(*moments))
    assert isinstance(after, optax.ScaleByAdamState)
    moved = jax.tree.map(lambda p, s: p - rate * s, params, steps)
    return moved, Moments(*after)
