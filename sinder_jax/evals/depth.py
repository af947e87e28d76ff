"""DINOv2's linear depth head: 256 bins of distance from patch tokens.

    tokens of blocks, not normalized --head_input--> [B, h, w, n·2D]
    --init, make_step--> Head --predict--> meters --scores--> RMSE and others

Follows "dinov2/eval/depth" and its training configs for NYU Depth v2. The tokens are
taken before the final norm, so that tokens of a large norm reach the head as they are.
The configs' GradientLoss is left out: as released it subtracts pixels of different
images, and is 0 for the two images of each GPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Num, PRNGKeyArray, Shaped

BINS = 256
UPSAMPLING = 4  # of the logits, per side
VARIANCE_WEIGHT = 0.15  # of the squared mean in SigLoss
LOG_OFFSET = 0.001  # meters, added before a logarithm in SigLoss


# --- Depth and its loss ---------------------------------------------------------------


def depth_from_logits(
    logits: Num[ArrayLike, "*shape bins"],
    min_depth: float,
    max_depth: float,
) -> Float[Array, "*shape"]:
    """Expected distance: bins of uniform distance, weighted by relu(logits) + 0.1.

    The weights are divided by their sum, not by a softmax: a factor on all logits
    changes the depth.

    Args:
      logits: one for each bin; integers, and narrow floats, are taken as float32.
      min_depth: distance of the first bin, meters.
      max_depth: of the last bin.

    Returns:
      Meters, between the two.
    """
    z = jnp.asarray(logits)
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    weights = jax.nn.relu(z) + 0.1
    bins = jnp.asarray(np.linspace(min_depth, max_depth, z.shape[-1]), z.dtype)
    depth = jnp.matmul(weights, bins, precision="highest") / jnp.sum(weights, axis=-1)
    return jnp.clip(depth, min_depth, max_depth)  # which rounding may leave


def sig_loss(
    predicted: Float[ArrayLike, "*shape"],
    truth: Float[ArrayLike, "*shape"],
    *,
    warm_up: bool | Shaped[Array, ""] = False,
) -> Float[Array, ""]:
    """Scale-invariant loss over all pixels whose true depth is above 0 (`SigLoss`).

    With g = log(predicted + 0.001) − log(truth + 0.001): √(Var g + 0.15·(mean g)²), the
    variance unbiased.

    Args:
      predicted: meters.
      truth: meters; 0 where unknown.
      warm_up: True leaves the variance out, as in the first 100 steps.

    Returns:
      The loss; 0 with gradient 0 without a known pixel, and where a root would have
      none. NaN if a known distance, or its prediction, is not finite.
    """
    valid = jnp.asarray(truth) > 0
    count = jnp.sum(valid)
    g = jnp.log(jnp.asarray(predicted) + LOG_OFFSET)
    g = jnp.where(valid, g - jnp.log(jnp.asarray(truth) + LOG_OFFSET), 0)
    mean = jnp.sum(g) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(valid, (g - mean) ** 2, 0))
    variance = jnp.where(warm_up, 0, squares / jnp.maximum(count - 1, 1))
    value = variance + VARIANCE_WEIGHT * mean**2
    # The root has an infinite slope at 0.
    return jnp.where(value == 0, 0, jnp.sqrt(jnp.where(value == 0, 1, value)))


def scores(
    predicted: Float[ArrayLike, "*shape"],
    truth: Float[ArrayLike, "*shape"],
    min_depth: float,
    max_depth: float,
) -> dict[str, float]:
    """Errors of one image, over the pixels whose true depth is in the open range.

    Args:
      predicted: meters, above 0.
      truth: meters; what is outside the range, such as 0, is ignored.
      min_depth: lower end of the range, meters.
      max_depth: upper end.

    Returns:
      a1, a2, a3: shares of the pixels within a factor 1.25, 1.25², 1.25³; abs_rel,
      sq_rel (m), rmse (m), rmse_log (natural logarithm), log_10; silog, 100 times the
      deviation of the log error. NaN without a pixel.
    """
    pred, true = (np.asarray(x, np.float64) for x in (predicted, truth))
    valid = (true > min_depth) & (true < max_depth)
    p, t = pred[valid], true[valid]
    if not p.size:
        return dict.fromkeys(METRICS, float("nan"))
    ratio = np.maximum(t / p, p / t)
    log_error = np.log(p) - np.log(t)
    # Rounding may make the difference negative if all errors are equal.
    variance = max(np.mean(log_error**2) - np.mean(log_error) ** 2, 0)
    found = {
        "a1": np.mean(ratio < 1.25),
        "a2": np.mean(ratio < 1.25**2),
        "a3": np.mean(ratio < 1.25**3),
        "abs_rel": np.mean(np.abs(t - p) / t),
        "sq_rel": np.mean((t - p) ** 2 / t),
        "rmse": np.sqrt(np.mean((t - p) ** 2)),
        "rmse_log": np.sqrt(np.mean(log_error**2)),
        "log_10": np.mean(np.abs(np.log10(t) - np.log10(p))),
        "silog": 100 * np.sqrt(variance),
    }
    return {name: float(found[name]) for name in METRICS}


METRICS = (
    *("a1", "a2", "a3", "abs_rel", "sq_rel"),
    *("rmse", "rmse_log", "log_10", "silog"),
)


# --- The head -------------------------------------------------------------------------


def blocks(depth: int, layers: int) -> tuple[int, ...]:
    """Blocks whose tokens the head reads, from 0: the last, or four spread over all.

    The four are DINOv2's ("dinov2/hub/depthers.py"): 2, 5, 8, 11 of 12 blocks; 4, 11,
    17, 23 of 24; 9, 19, 29, 39 of 40. For other depths, the ends of the four quarters.

    Args:
      depth: L, blocks of the model.
      layers: 1 or 4.

    Raises:
      ValueError: another number, or fewer blocks than that.
    """
    if layers not in (1, 4):
        raise ValueError(f"got layers={layers}, expected 1 or 4")
    if depth < layers:
        raise ValueError(f"got a model with {depth} blocks, expected at least {layers}")
    if layers == 1:
        return (depth - 1,)
    if depth == 24:
        return (4, 11, 17, 23)
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def head_input(
    cls: Float[ArrayLike, "n B D"], patches: Float[ArrayLike, "n B h w D"]
) -> Float[Array, "B h w _"]:
    """Concatenates, block by block, each patch token and the image's class token.

    Args:
      cls: class tokens of n blocks, before the final norm.
      patches: patch tokens likewise.

    Returns:
      float32 [B, h, w, n·2D].
    """
    patches = jnp.asarray(patches, jnp.float32)
    tokens = jnp.asarray(cls, jnp.float32)[:, :, None, None, :]
    everywhere = jnp.broadcast_to(tokens, patches.shape)
    pairs = jnp.concatenate([patches, everywhere], axis=-1)
    n, b, h, w, channels = pairs.shape
    return jnp.moveaxis(pairs, 0, 3).reshape(b, h, w, n * channels)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a head is trained; the defaults are DINOv2's for NYU Depth v2.

    Attributes:
      total_steps: of the schedules.
      min_depth, max_depth: of the bins, meters.
      learning_rate: of AdamW, at its peak.
      weight_decay: of AdamW.
      clip: largest norm of the gradient.
      group: images that share one loss, as on one of the originals' GPUs; a batch's
        loss is the mean over its groups.
      loss_warm_up: first steps, in which the loss leaves the variance out.

    Raises:
      ValueError: an option out of range.
    """

    total_steps: int = 38_400
    min_depth: float = 0.001
    max_depth: float = 10.0
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip: float = 35.0
    group: int = 2
    loss_warm_up: int = 100

    def __post_init__(self):
        for name, ok, wanted in (
            ("total_steps", self.total_steps >= 1, "at least 1"),
            ("min_depth", self.min_depth > 0, "above 0"),
            ("max_depth", self.max_depth > self.min_depth, "above min_depth"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("clip", self.clip > 0, "above 0"),
            ("group", self.group >= 1, "at least 1"),
            ("loss_warm_up", self.loss_warm_up >= 0, "at least 0"),
        ):
            if not ok:
                got = getattr(self, name)
                raise ValueError(f"got {name}={got}, expected {wanted}")


@struct.dataclass
class Head:
    """A depth head and its optimizer.

    Attributes:
      kernel: weights of the 1 × 1 convolution [channels, bins].
      bias: [bins].
      kernel_mean, bias_mean: AdamW's mean of the gradients.
      kernel_square, bias_square: AdamW's mean of their squares.
      step: steps taken so far.
    """

    kernel: Float[Array, "channels bins"]
    bias: Float[Array, " bins"]
    kernel_mean: Float[Array, "channels bins"]
    bias_mean: Float[Array, " bins"]
    kernel_square: Float[Array, "channels bins"]
    bias_square: Float[Array, " bins"]
    step: Int[Array, ""]


def init(
    key: PRNGKeyArray | Shaped[Array, "2"], channels: int, *, bins: int = BINS
) -> Head:
    """A head before its first step: PyTorch's default, U(±1/√channels) for all.

    Args:
      key: of the weights.
      channels: of the features, n·2D.
      bins: of distance.
    """
    bound = channels**-0.5
    keys = jax.random.split(key)
    kernel, bias = (
        jax.random.uniform(each, shape, jnp.float32, -bound, bound)
        for each, shape in zip(keys, ((channels, bins), (bins,)), strict=True)
    )
    return Head(
        kernel=kernel,
        bias=bias,
        kernel_mean=jnp.zeros_like(kernel),
        bias_mean=jnp.zeros_like(bias),
        kernel_square=jnp.zeros_like(kernel),
        bias_square=jnp.zeros_like(bias),
        step=jnp.zeros((), jnp.int32),
    )


def learning_rate(step: ArrayLike, options: Options) -> Float[Array, ""]:
    """Cosine from the peak to 1e-8 of it, with a linear warm-up over the first third.

    In the configs 12,800 of 38,400 steps, from 0.001 of the cosine's value on.
    """
    total = options.total_steps
    left = jnp.maximum(total - jnp.asarray(step), 0).astype(jnp.float32)
    share = jnp.sin(0.5 * jnp.pi * left / total) ** 2  # (1 + cos)/2 without rounding
    rate = options.learning_rate * (1e-8 + (1 - 1e-8) * share)
    done = jnp.minimum(jnp.asarray(step) / (total // 3 or 1), 1)
    return rate * (0.001 * (1 - done) + done)


def beta1(step: ArrayLike, options: Options) -> Float[Array, ""]:
    """AdamW's first beta: 0.95 to 0.85 over the first 30 % of the steps, and back.

    Both by a half cosine, as PyTorch's `OneCycleLR` cycles momentum.
    """
    turn = int(0.3 * options.total_steps) - 1
    step = jnp.asarray(step).astype(jnp.float32)
    down = step / max(turn, 1)
    up = (step - turn) / max(options.total_steps - 1 - turn, 1)
    share = jnp.where(step <= turn, down, 1 - up)  # 0 is 0.95, 1 is 0.85
    return 0.9 + 0.05 * jnp.cos(jnp.pi * share)


def make_step(options: Options) -> Callable[..., tuple[Head, Float[Array, ""]]]:
    """One step of AdamW on the mean `sig_loss` over groups of images.

    Returns:
      step(state, features [B, h, w, channels], truth [B, height, width]) -> (state,
      loss before the step). B is a multiple of `options.group`; the truth is in meters,
      0 where unknown; it covers the image that was padded to whole patches, and the
      prediction is resized to it as a whole, padding included, as in the originals.
    """

    def step(
        state: Head,
        features: Float[ArrayLike, "B h w channels"] | Sequence[Any],
        truth: Float[ArrayLike, "_ height width"] | Sequence[Any],
    ) -> tuple[Head, Float[Array, ""]]:
        features, truth = jnp.asarray(features), jnp.asarray(truth)
        _check(state, features)
        images = len(features)
        if images % options.group:
            raise ValueError(
                f"got {images} images, expected a multiple of the "
                f"{options.group} that share a loss"
            )
        if truth.ndim != 3 or len(truth) != images:
            raise ValueError(
                f"got a truth of shape {truth.shape}, expected [{images}, height, "
                "width]"
            )
        return _step(state, features, truth, options)

    return step


@functools.partial(jax.jit, static_argnums=3)
def _step(
    state: Head, features: Any, truth: Any, options: Options
) -> tuple[Head, Array]:
    weights = (state.kernel, state.bias)
    warm_up = state.step < options.loss_warm_up

    def of_group(group: tuple[Array, Array]) -> Any:
        def loss(weights: tuple[Array, Array]) -> Array:
            depth = _depth(weights, group[0], options.min_depth, options.max_depth)
            return sig_loss(
                _resized(depth, group[1].shape[1:]), group[1], warm_up=warm_up
            )

        return jax.value_and_grad(loss)(weights)

    groups = tuple(
        jnp.reshape(x, (-1, options.group, *x.shape[1:])) for x in (features, truth)
    )
    # One group after the other: the logits of a group take 40 MB.
    losses, gradients = lax.map(of_group, groups)
    gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
    return _adamw(state, gradient, options), jnp.mean(losses)


def _adamw(state: Head, gradient: tuple[Array, Array], options: Options) -> Head:
    """PyTorch's AdamW, with a first beta that changes.

    As in PyTorch, the bias correction takes a power of the beta of the current step.
    """
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradient))
    gradient = jax.tree.map(
        lambda g: g * jnp.minimum(options.clip / (norm + 1e-6), 1), gradient
    )
    rate, b1 = learning_rate(state.step, options), beta1(state.step, options)
    b2, taken = 0.999, (state.step + 1).astype(jnp.float32)

    def moved(w: Array, mean: Array, square: Array, g: Array) -> Any:
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * g**2
        root = jnp.sqrt(square) / jnp.sqrt(1 - b2**taken) + 1e-8
        w = w * (1 - rate * options.weight_decay)
        return w - rate / (1 - b1**taken) * mean / root, mean, square

    kernel = moved(state.kernel, state.kernel_mean, state.kernel_square, gradient[0])
    bias = moved(state.bias, state.bias_mean, state.bias_square, gradient[1])
    return Head(
        kernel=kernel[0],
        bias=bias[0],
        kernel_mean=kernel[1],
        bias_mean=bias[1],
        kernel_square=kernel[2],
        bias_square=bias[2],
        step=state.step + 1,
    )


def _depth(
    weights: tuple[Array, Array], features: Any, min_depth: float, max_depth: float
) -> Array:
    """[B, 4h, 4w] meters. The original resizes before the convolution: the same."""
    kernel, bias = weights
    x = jnp.asarray(features, jnp.float32)
    logits = jnp.matmul(x, kernel, precision="highest") + bias[None, None, None, :]
    b, h, w, bins = logits.shape
    size = (b, UPSAMPLING * h, UPSAMPLING * w, bins)
    return depth_from_logits(
        jax.image.resize(logits, size, "linear"), min_depth, max_depth
    )


def _resized(depth: Array, size: tuple[int, ...]) -> Array:
    """Bilinear without antialiasing, PyTorch's `align_corners=False`."""
    return jax.image.resize(depth, (depth.shape[0], *size), "linear", antialias=False)


def predict(
    state: Head,
    features: Float[ArrayLike, "B h w channels"] | Sequence[Any],
    size: tuple[int, int],
    *,
    min_depth: float = 0.001,
    max_depth: float = 10.0,
) -> Float[Array, "B height width"]:
    """Distances in meters, resized to `size`, from features of whole images.

    Clamped to the range before the resize, as in the originals.

    Args:
      state: the head.
      features: from `head_input`.
      size: rows and columns of the result.
      min_depth: distance of the first bin, meters.
      max_depth: of the last bin.
    """
    features = jnp.asarray(features)
    _check(state, features)
    return _predict(
        (state.kernel, state.bias), features, tuple(size), min_depth, max_depth
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _predict(
    weights: tuple[Array, Array],
    features: Any,
    size: tuple[int, int],
    min_depth: float,
    max_depth: float,
) -> Array:
    def of_image(x: Array) -> Array:
        depth = _depth(weights, x[None], min_depth, max_depth)
        return _resized(jnp.clip(depth, min_depth, max_depth), size)[0]

    return lax.map(of_image, jnp.asarray(features))


def _check(state: Head, features: Array) -> None:
    if features.ndim != 4 or features.shape[-1] != len(state.kernel):
        raise ValueError(
            f"got features of shape {features.shape}, expected [B, h, w, "
            f"{len(state.kernel)}], with as many channels as at `init`"
        )
