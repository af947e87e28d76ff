"""DINOv2's linear probe: many linear classifiers trained at once on frozen features.

    tokens of the last four blocks --features--> four kinds of features
    one kind --init, make_step--> a head per learning rate --ranks--> top-1, top-5

Heads share nothing but their features, so each trains as it would alone: the heads of a
state take their step one after the other, in the same operations for any number of
heads. Follows "dinov2/eval/linear.py".
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Shaped

BASE_LEARNING_RATES = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    *(2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
)
"""For a batch of 256 images; see `scaled`."""
BASE_BATCH = 256
MOMENTUM = 0.9
INIT_STD = 0.01

Kind = tuple[int, bool]  # number of blocks, with the mean of the patches or without
KINDS: tuple[Kind, ...] = ((1, False), (1, True), (4, False), (4, True))
"""In the order in which the first of equally good heads wins."""


@struct.dataclass
class Heads:
    """K linear classifiers of one kind of features.

    Attributes:
      kernel: weights [K, dim, C].
      bias: [K, C].
      kernel_momentum, bias_momentum: SGD's velocities, PyTorch's convention.
      learning_rates: of the first step, scaled already [K].
      step: steps taken so far.
    """

    kernel: Float[Array, "K dim C"]
    bias: Float[Array, "K C"]
    kernel_momentum: Float[Array, "K dim C"]
    bias_momentum: Float[Array, "K C"]
    learning_rates: Float[Array, " K"]
    step: Int[Array, ""]


def features(
    cls: Float[ArrayLike, "blocks B D"], patches: Float[ArrayLike, "_ B H W D"]
) -> dict[Kind, Float[Array, "B _"]]:
    """Concatenates class tokens and the mean patch token, as `create_linear_input`.

    Args:
      cls: class tokens of the last four blocks, oldest first, after the final norm.
      patches: patch tokens likewise, without registers; only the last block's are used,
        so an array of one block will do.

    Returns:
      Float32 features of each of `KINDS`: class tokens of the last n blocks, oldest
      first, then the mean over the last block's patches: D, 2D, 4D and 5D numbers.

    Raises:
      ValueError: fewer than four blocks of class tokens.
    """
    tokens = jnp.asarray(cls, jnp.float32)
    if len(tokens) < 4:
        raise ValueError(f"got {len(tokens)} blocks, expected the last four")
    mean = jnp.mean(jnp.asarray(patches)[-1].astype(jnp.float32), axis=(1, 2))
    found = {}
    for count, pooled in KINDS:
        parts = [*tokens[-count:], *([mean] if pooled else [])]
        found[count, pooled] = jnp.concatenate(parts, axis=-1)
    return found


def scaled(learning_rates: Sequence[float], batch_size: int) -> list[float]:
    """Learning rates for a batch: in proportion to its size (`scale_lr`)."""
    return [rate * batch_size / BASE_BATCH for rate in learning_rates]


def init(
    key: PRNGKeyArray | Shaped[Array, "2"],
    dim: int,
    num_classes: int,
    learning_rates: Sequence[float] | Float[ArrayLike, " K"],
) -> Heads:
    """Heads before the first step: weights from N(0, 0.01²), biases 0.

    A head's weights depend on the key and on its own learning rate, not on the other
    heads: alone it starts, and trains, as among others.

    Args:
      key: of the initial weights.
      dim: width of the features.
      num_classes: C, at least 2.
      learning_rates: one per head, scaled for the batch already (`scaled`).

    Raises:
      ValueError: an argument out of range.
    """
    rates = np.asarray(learning_rates, np.float32)
    if (
        rates.ndim != 1
        or not rates.size
        or not np.all(np.isfinite(rates) & (rates > 0))
    ):
        raise ValueError(f"got learning rates {learning_rates}, expected some above 0")
    if dim < 1 or num_classes < 2:
        raise ValueError(
            f"got features of width {dim} and {num_classes} classes, expected a width "
            "of at least 1 and at least 2 classes"
        )

    kernel = _weights(key, rates.view(np.uint32), dim, num_classes)
    bias = jnp.zeros((len(rates), num_classes), jnp.float32)
    return Heads(
        kernel=kernel,
        bias=bias,
        kernel_momentum=jnp.zeros_like(kernel),
        bias_momentum=jnp.zeros_like(bias),
        learning_rates=jnp.asarray(rates),
        step=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _weights(key: Array, numbers: Array, dim: int, num_classes: int) -> Array:
    def of_head(number: Array) -> Array:
        own = jax.random.fold_in(key, number)
        return INIT_STD * jax.random.normal(own, (dim, num_classes), jnp.float32)

    return lax.map(of_head, numbers)


def cosine(step: ArrayLike, total_steps: ArrayLike) -> Float[Array, ""]:
    """½(1 + cos(π·step / total)): 1 at the first step, 0 after the last and beyond.

    As sin² of the steps that are left, which float32 computes to 7 digits to the end.
    """
    total = jnp.asarray(total_steps, jnp.float32)
    left = jnp.maximum(jnp.asarray(total_steps) - step, 0).astype(jnp.float32)
    return jnp.sin(0.5 * jnp.pi * left / total) ** 2


def make_step(
    total_steps: int, *, donate: bool = False
) -> Callable[..., tuple[Heads, Float[Array, " K"]]]:
    """One step of SGD with momentum 0.9 for every head.

    The learning rate falls by `cosine` to 0 after `total_steps`. It is no part of the
    velocity: v ← 0.9·v + gradient, w ← w − rate·v.

    Args:
      total_steps: of the schedule.
      donate: True gives the memory of a step's state to the next one: the state passed
        in can then not be used again, and half the memory is enough.

    Returns:
      step(state, features [B, dim], labels int32 [B]) -> (state, losses [K]): the mean
      cross-entropy of each head before the step, in nats. The step raises ValueError
      for labels beyond the classes, for features of another width and for another
      number of labels than of features.

    Raises:
      ValueError: `total_steps` is below 1.
    """
    if total_steps < 1:
        raise ValueError(f"got total_steps={total_steps}, expected at least 1")
    run = _donating_step if donate else _step

    def step(
        state: Heads,
        features: Float[ArrayLike, "B dim"] | Sequence[Any],
        labels: Int[ArrayLike, "_"] | Sequence[Any],
    ) -> tuple[Heads, Float[Array, " K"]]:
        return run(state, *_checked(state, features, labels), total_steps)

    return step


def _all_heads(
    state: Heads, features: Array, labels: Array, total_steps: ArrayLike
) -> tuple[Heads, Array]:
    rates = state.learning_rates * cosine(state.step, total_steps)
    trained = (state.kernel, state.bias)
    velocities = (state.kernel_momentum, state.bias_momentum)

    def one(k: Array, carry: Any) -> Any:
        trained, velocities, losses = carry
        weights, before = jax.tree.map(lambda x: x[k], (trained, velocities))
        loss, gradient = jax.value_and_grad(_cross_entropy)(weights, features, labels)
        after = jax.tree.map(lambda v, g: MOMENTUM * v + g, before, gradient)
        weights = jax.tree.map(lambda w, v: w - rates[k] * v, weights, after)

        def put(stacked: Array, value: Array) -> Array:
            return stacked.at[k].set(value)

        return (
            jax.tree.map(put, trained, weights),
            jax.tree.map(put, velocities, after),
            losses.at[k].set(loss),
        )

    losses = jnp.zeros(len(rates), jnp.float32)
    trained, velocities, losses = lax.fori_loop(
        0, len(rates), one, (trained, velocities, losses)
    )
    moved = state.replace(  # type: ignore[attr-defined]
        kernel=trained[0],
        bias=trained[1],
        kernel_momentum=velocities[0],
        bias_momentum=velocities[1],
        step=state.step + 1,
    )
    return moved, losses


_step = jax.jit(_all_heads)
_donating_step = jax.jit(_all_heads, donate_argnums=0)


def _logits(weights: tuple[Array, Array], features: Array) -> Array:
    kernel, bias = weights
    x = jnp.asarray(features, jnp.float32)
    return jnp.matmul(x, kernel, precision="highest") + bias[None, :]


def _cross_entropy(
    weights: tuple[Array, Array], features: Array, labels: Array
) -> Array:
    logits = _logits(weights, features)
    own = jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)


def ranks(
    state: Heads,
    features: Float[ArrayLike, "B dim"] | Sequence[Any],
    labels: Int[ArrayLike, "_"] | Sequence[Any],
) -> Int[Array, "K B"]:
    """How many classes each head prefers to the true one: 0 is right, below 5 is top-5.

    Of equal logits the lower class comes first. A head that has diverged (logits are
    not numbers) prefers all classes.

    Raises:
      ValueError: labels beyond the classes, features of another width, or another
        number of labels than of features.
    """
    return _ranks((state.kernel, state.bias), *_checked(state, features, labels))


@jax.jit
def _ranks(heads: tuple[Array, Array], features: Array, labels: Array) -> Array:
    true = jnp.asarray(labels)[:, None]

    def of_head(weights: tuple[Array, Array]) -> Array:
        logits = _logits(weights, features)
        own = jnp.take_along_axis(logits, true, axis=1)
        later = jnp.arange(logits.shape[1])[None, :] >= true
        behind = (logits < own) | ((logits == own) & later)
        return jnp.sum(~behind, axis=1, dtype=jnp.int32)

    return lax.map(of_head, heads)


def best(accuracy: Mapping[Kind, Float[np.ndarray, " K"]]) -> tuple[Kind, int]:
    """The head with the largest accuracy: its kind and number.

    Of equal heads the first one wins, in the order of `KINDS` and then of the heads.

    Args:
      accuracy: of each head, by kind; some of `KINDS`.
    """
    kinds = [kind for kind in KINDS if kind in accuracy]
    best = max(kinds, key=lambda kind: np.max(accuracy[kind]))  # the first of several
    return best, int(np.argmax(accuracy[best]))


def _checked(state: Heads, features: Any, labels: Any) -> tuple[Any, Any]:
    """Both as arrays, where they are."""
    features, labels = (
        x if isinstance(x, jax.Array) else np.asarray(x) for x in (features, labels)
    )
    _, dim, classes = state.kernel.shape
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(
            f"got features of shape {features.shape}, expected [B, {dim}], as wide as "
            "at `init`"
        )
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"got labels {labels.shape} of {labels.dtype} for {len(features)} rows of "
            "features, expected an integer for each"
        )
    if isinstance(labels, jax.core.Tracer):
        # Inside a larger jitted function, whose caller must check.
        return features, labels
    known = np.asarray(labels)
    if known.size and not (0 <= known.min() and known.max() < classes):
        wrong = known.min() if known.min() < 0 else known.max()
        raise ValueError(
            f"got the label {wrong}, expected 0 to {classes - 1}: the heads have "
            f"{classes} classes"
        )
    return features, labels
