"""The outliers of one image along a direction, their learning target and the loss.

    tokens [H, W, D], direction [D] --cosine--> logits [H, W] --threshold--> mask [H, W]
    tokens, logits --weights of the window--> target [H, W, D]
    tokens, target, mask --mean distance / α--> loss

Arrays only: nothing here knows a model. Equations (5) and (7) of the paper.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

TINY_NORM = 1e-12  # below it a vector is treated as having no direction

GAUSSIANS = {
    3: np.outer([1, 2, 1], [1, 2, 1]) / 16,
    5: np.array(
        [
            [1, 4, 7, 4, 1],
            [4, 16, 26, 16, 4],
            [7, 26, 41, 26, 7],
            [4, 16, 26, 16, 4],
            [1, 4, 7, 4, 1],
        ]
    )
    / 273,
}
"""The Gaussian windows of the authors' code, by side."""


class NeighborLossAux(NamedTuple):
    """What the loss was computed from.

    Attributes:
      mask: True for the outliers.
      target: the learning target; not meaningful within window//2 of the border.
      alpha: mean norm of the interior tokens, which the loss is divided by.
    """

    mask: Bool[Array, "H W"]
    target: Float[Array, "H W D"]
    alpha: Float[Array, ""]


def normalize(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Unit vectors x / max(‖x‖, 1e-12); a zero vector stays zero."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(norm, TINY_NORM)


def outlier_logits(
    tokens: Float[Array, "*grid D"], direction: Float[Array, " D"]
) -> Float[Array, "*grid"]:
    """Equation (5): -|cos(token, direction)|, from -1 (defective) to 0."""
    cosine = jnp.einsum(
        "...d,d->...",
        normalize(tokens),
        normalize(direction),
        precision=jax.lax.Precision.HIGHEST,
    )
    return -jnp.abs(cosine)


def interior(height: int, width: int, window: int) -> Bool[np.ndarray, "H W"]:
    """Patches whose whole window lies in the image: window//2 away from the border."""
    border = window // 2
    inside = np.zeros((height, width), bool)
    inside[border : height - border, border : width - border] = True
    return inside


def outlier_mask(
    logits: Float[Array, "H W"], *, mask_thr: float, window: int
) -> Bool[Array, "H W"]:
    """Patches with logit < mean - mask_thr·std, the border excepted.

    The border counts in mean and standard deviation (ddof=1) but is never an outlier.

    Args:
      logits: from `outlier_logits`.
      mask_thr: in standard deviations, above 0.
      window: side of the neighbor window, 3 or 5.
    """
    threshold = jnp.mean(logits) - mask_thr * jnp.std(logits, ddof=1)
    height, width = logits.shape
    return (logits < threshold) & jnp.asarray(interior(height, width, window))


def neighbor_target(
    tokens: Float[Array, "H W D"],
    logits: Float[Array, "H W"],
    *,
    window: int,
    temperature: float,
) -> Float[Array, "H W D"]:
    """Equation (7): mean of the tokens of a window, weighted away from the defect.

    Weights are exp(logit/τ) times a Gaussian of the window, normalized; the center is
    included. Exponents are shifted by the window's maximum, because at τ = 0.01 the
    plain exponentials underflow. Near the border the window is cut off.

    Args:
      tokens: patch tokens of one image.
      logits: their `outlier_logits`.
      window: 3 or 5.
      temperature: τ, above 0.
    """
    height, width, _ = tokens.shape
    border = window // 2
    around = ((border, border), (border, border))
    tokens = jnp.pad(tokens, (*around, (0, 0)))
    logits = jnp.pad(logits, around, constant_values=-jnp.inf)
    shifts = [(row, column) for row in range(window) for column in range(window)]

    def shifted(x: Array, row: int, column: int) -> Array:
        return x[row : row + height, column : column + width]

    windows = jnp.stack([shifted(logits, *shift) for shift in shifts])
    weights = jnp.exp((windows - jnp.max(windows, axis=0, keepdims=True)) / temperature)
    weights = weights * jnp.asarray(GAUSSIANS[window], tokens.dtype).reshape(-1, 1, 1)
    weights = weights / jnp.sum(weights, axis=0, keepdims=True)
    target = jnp.zeros((height, width, tokens.shape[-1]), tokens.dtype)
    for weight, shift in zip(weights, shifts, strict=True):
        target = target + weight[:, :, None] * shifted(tokens, *shift)
    return target


def neighbor_loss(
    tokens: Float[Array, "H W D"],
    direction: Float[Array, " D"],
    *,
    mask_thr: float = 4.0,
    window: int = 3,
    temperature: float = 0.1,
    mask: Bool[Array, "H W"] | None = None,
) -> tuple[Float[Array, ""], NeighborLossAux]:
    """The neighbor loss of one image: mean over outliers of ‖x − target‖₂ / α.

    Mask, target and α carry no gradient. Without outliers the loss is 0, with a
    gradient of zero.

    Args:
      tokens: patch tokens of a block, before the final norm.
      direction: the block's singular defect direction; its length and sign are
        ignored, a zero vector detects nothing.
      mask_thr: an outlier is this many standard deviations off the mean; above 0.
      window: side of the neighbor window, 3 or 5 patches.
      temperature: τ of the weights, above 0.
      mask: outliers found before; None detects them.

    Returns:
      (loss, `NeighborLossAux`).

    Raises:
      ValueError: an option out of range.
    """
    check_loss_options(mask_thr=mask_thr, window=window, temperature=temperature)
    fixed = jax.lax.stop_gradient(tokens)
    logits = outlier_logits(fixed, jax.lax.stop_gradient(direction))
    if mask is None:
        mask = outlier_mask(logits, mask_thr=mask_thr, window=window)
    target = neighbor_target(fixed, logits, window=window, temperature=temperature)
    height, width = logits.shape
    inside = interior(height, width, window)
    norms = jnp.linalg.norm(fixed, axis=-1)
    alpha = jnp.sum(jnp.where(inside, norms, 0.0)) / max(int(inside.sum()), 1)
    distance = _safe_norm(jnp.where(mask[:, :, None], tokens - target, 0.0))
    count = jnp.maximum(jnp.sum(mask), 1)
    # Without outliers the sum is zero; α may be too, on an image without interior.
    loss = jnp.sum(distance) / count / jnp.where(jnp.any(mask), alpha, 1.0)
    return loss, NeighborLossAux(mask, target, alpha)


def check_loss_options(
    *, mask_thr: float = 4.0, window: int = 3, temperature: float = 0.1
) -> None:
    """Raises ValueError naming the given option that is out of range."""
    check_option("window", window, window in GAUSSIANS, "3 or 5 patches")
    for name, value in (("mask_thr", mask_thr), ("temperature", temperature)):
        check_option(name, value, value > 0, "above 0")


def check_option(name: str, value: Any, is_allowed: bool, allowed: str) -> None:
    """Raises ValueError naming the option and its value unless the value is allowed."""
    if not is_allowed:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _safe_norm(x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """‖x‖₂ along the last axis; its gradient at zero is zero, not 0/0."""
    squared = jnp.sum(jnp.square(x), axis=-1)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
