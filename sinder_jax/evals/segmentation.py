"""Linear semantic segmentation on frozen patch features, as DINOv2 evaluates it.

    image --center_padding, backbone--> features [B, h, w, C]
    features, labels --make_step--> BatchNorm and a linear layer, trained
    features --predict--> logits of one window
    logits of all windows --merge_weights, probabilities--> those of the whole image

DINOv2 runs this protocol in mmsegmentation 0.27. Cited are its functions and those of
facebookresearch/dinov2. Where the sources leave something open: windows are padded, not
resized, to whole patches; the head after the last iteration counts; the long side of a
resized image has no limit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Integer

from sinder_jax import placement
from sinder_jax.evals import bilinear

IGNORE = 255
WARMUP = 1_500  # iterations of the published heads
KERNEL_STD = 0.01  # of a new head's kernel
NORM_EPSILON = 1e-5
NORM_MOMENTUM = 0.1  # share of the new batch in the running statistics
HIGHEST = "highest"

Numbers = Array | np.ndarray  # of the host or of a device


# --- Windows and padding --------------------------------------------------------------


def windows(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """The windows that cover one axis of an image, mmsegmentation's `slide_inference`.

    Args:
      length: pixels of the axis.
      crop: pixels of a window; an axis that is shorter is one window.
      stride: pixels from a window to the next one; the last one is moved back to end
        with the image.

    Returns:
      (start, stop) of each window, in order.

    Raises:
      ValueError: a value below 1, or a stride that would leave pixels uncovered.
    """
    for name, value in (("length", length), ("crop", crop), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name}: got {value} pixels, expected at least 1")
    if stride > crop:
        raise ValueError(
            f"got stride {stride} for windows of {crop} pixels, expected at most {crop}"
        )
    count = max(length - crop + stride - 1, 0) // stride + 1
    stops = [min(i * stride + crop, length) for i in range(count)]
    return [(max(stop - crop, 0), stop) for stop in stops]


def center_padding(n: int, patch: int = 14) -> tuple[int, int]:
    """Pixels added before and after an axis to make it whole patches.

    `CenterPadding` of dinov2/eval/segmentation and its notebooks: the odd pixel goes
    after.
    """
    if n < 1 or patch < 1:
        raise ValueError(f"got {n} pixels and patch {patch}, expected at least 1")
    pad = -n % patch
    return pad // 2, pad - pad // 2


def pad_images(
    images: Float[Numbers, "B height width 3"], patch: int = 14
) -> Float[Array, "B padded_height padded_width 3"]:
    """Normalized images with `center_padding`, filled with zeros: the mean color."""
    sides = [center_padding(side, patch) for side in images.shape[1:3]]
    return jnp.pad(images, [(0, 0), *sides, (0, 0)])


# --- The head -------------------------------------------------------------------------


class Head(NamedTuple):
    """Trained parameters: BatchNorm's scale and bias, then a 1 x 1 convolution."""

    scale: Float[Array, " C"]
    shift: Float[Array, " C"]
    kernel: Float[Array, "C classes"]
    bias: Float[Array, " classes"]


class SegmentationState(NamedTuple):
    """What training changes.

    Attributes:
      head: parameters.
      mean, variance: running statistics of the features, for `predict`.
      first_moment, second_moment: Adam's, of each parameter.
      step: iterations done, int32.
    """

    head: Head
    mean: Float[Array, " C"]
    variance: Float[Array, " C"]
    first_moment: Head
    second_moment: Head
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class SegmentationOptions:
    """How a head is trained; the defaults are those of DINOv2's published heads.

    Attributes:
      total_steps: iterations; the learning rate reaches 0 after the last one.
      lr: AdamW's learning rate, decreasing linearly (mmcv's "poly" of power 1).
      warmup_steps: of the linear warm-up; None: 1,500, or all of a shorter training.
      warmup_ratio: share of the learning rate with which the warm-up begins.
      weight_decay: decoupled, of all parameters, BatchNorm's and biases too.
      beta1, beta2, epsilon: Adam's.

    Raises:
      ValueError: an option out of range.
    """

    total_steps: int = 40_000
    lr: float = 1e-3
    warmup_steps: int | None = None
    warmup_ratio: float = 1e-6
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self):
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(WARMUP, self.total_steps)
            object.__setattr__(self, "warmup_steps", warmup)  # it is frozen
        rules = {
            "total_steps": (self.total_steps >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "warmup_steps": (
                0 <= warmup <= self.total_steps,
                f"from 0 to total_steps, {self.total_steps}",
            ),
            "warmup_ratio": (0 <= self.warmup_ratio <= 1, "from 0 to 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
            "epsilon": (0 < self.epsilon < math.inf, "above 0"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(
                    f"got {name}={getattr(self, name)}, must be {expected}"
                )


def learning_rate(
    step: Int[Array, "*shape"] | int, options: SegmentationOptions
) -> Float[Array, "*shape"]:
    """The learning rate of iteration `step`, from 0; mmcv's `PolyLrUpdaterHook`."""
    i = jnp.asarray(step, jnp.float32)
    base = options.lr * (options.total_steps - i) / options.total_steps
    # Their 1 − (1 − done)·(1 − ratio) would lose all digits of the first rates.
    steps = options.warmup_steps or 0  # a number, since the options were made
    done = i / max(steps, 1)
    warm = base * (done + options.warmup_ratio * (1 - done))
    return jnp.where(i < steps, warm, base)


def init(key: Array, channels: int, num_classes: int) -> SegmentationState:
    """A new head: `BNHead` of dinov2/eval/segmentation/models/decode_heads.

    Args:
      key: random key of the kernel.
      channels: C of the features: the width D, or 4·D for the last four blocks.
      num_classes: classes, at least 2; labels are 0 to num_classes - 1.

    Raises:
      ValueError: fewer channels or classes than that.
    """
    if channels < 1 or num_classes < 2:
        raise ValueError(
            f"got {channels} channels and {num_classes} classes, expected at least 1 "
            "and 2"
        )
    head = Head(
        scale=jnp.ones(channels),
        shift=jnp.zeros(channels),
        kernel=KERNEL_STD * jax.random.normal(key, (channels, num_classes)),
        bias=jnp.zeros(num_classes),
    )
    zeros = jax.tree.map(jnp.zeros_like, head)
    return SegmentationState(
        head,
        mean=jnp.zeros(channels),
        variance=jnp.ones(channels),
        first_moment=zeros,
        second_moment=jax.tree.map(jnp.copy, zeros),
        step=jnp.zeros((), jnp.int32),
    )


def _logits(
    head: Head,
    normalized: Float[Array, "B h w C"],
) -> Float[Array, "B h w classes"]:
    x = normalized * head.scale[None, None, None] + head.shift[None, None, None]
    y = jnp.matmul(x, head.kernel, precision=HIGHEST)
    return y + head.bias[None, None, None]


def _normalize(
    features: Float[Array, "B h w C"],
    mean: Float[Array, " C"],
    variance: Float[Array, " C"],
) -> Float[Array, "B h w C"]:
    centered = features - mean[None, None, None]
    return centered * lax.rsqrt(variance + NORM_EPSILON)[None, None, None]


def cross_entropy(
    logits: Float[Numbers, "h w classes"], labels: Integer[Numbers, "height width"]
) -> Float[Array, ""]:
    """Sum of the cross entropy over the valid pixels of one image.

    Args:
      logits: of patches; resized to the labels.
      labels: classes, or `IGNORE`. Any other label makes the sum NaN.
    """
    labels = jnp.asarray(labels)
    height, width = labels.shape
    scores = bilinear.resize(logits, (height, width))
    classes = scores.shape[-1]
    valid = labels != IGNORE
    known = (labels >= 0) & (labels < classes)
    picked = jnp.take_along_axis(
        scores, jnp.clip(labels, 0, classes - 1)[..., None], axis=-1
    )[..., 0]
    loss = jax.nn.logsumexp(scores, axis=-1) - picked
    return jnp.sum(jnp.where(valid, jnp.where(known, loss, jnp.nan), 0.0))


Step = Callable[
    [SegmentationState, Array, Array], tuple[SegmentationState, Float[Array, ""]]
]


def make_step(
    options: SegmentationOptions = SegmentationOptions(),
    sharding: NamedSharding | None = None,
) -> Step:
    """Makes one iteration: `state, loss = step(state, features, labels)`.

    The loss is the sum of the cross entropy over valid pixels, divided by the number of
    all pixels: in mmsegmentation 0.27, `avg_non_ignore=False`, ignored ones stay in the
    denominator. BatchNorm takes its statistics over the whole batch, whatever the
    devices; the running variance is the unbiased one, as PyTorch's.

    Each image's loss and its gradient by the patch logits is computed by itself, and
    the rest by every device on the whole batch: any number of devices gives the same
    bits.

    Args:
      options: see `SegmentationOptions`.
      sharding: of the images over devices, from `placement.over`; they must divide the
        batch. None: one device.

    Returns:
      A jitted function of the state, features [B, h, w, C] and integer labels [B,
      height, width] with `IGNORE` for pixels without class. The loss is that before the
      update; it is NaN if a label is beyond the classes. Raises ValueError for arrays
      that do not go together, or not with the head.
    """
    axis = None
    if sharding is not None:
        mesh, axis = placement.axis_of(sharding)

    def step(state, features, labels):
        return _step(options, axis, state, features, labels)

    run = step
    if sharding is not None:
        split, whole = PartitionSpec(axis), PartitionSpec()
        run = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(whole, split, split),
            out_specs=whole,
            check_vma=False,  # all devices compute the same from the same
        )
    compiled = jax.jit(run)
    return lambda state, *arrays: compiled(state, *map(_array, arrays))


def _array(x: Any) -> Numbers:
    """Also lists become an array; one that is on devices stays there."""
    return x if isinstance(x, Array) else np.asarray(x)


def _check_features(state: SegmentationState, features: Numbers) -> None:
    channels = len(state.mean)
    if features.ndim != 4 or features.shape[-1] != channels:
        raise ValueError(
            f"got features {features.shape}, expected [B, h, w, C] with the {channels} "
            "channels that the head was made for"
        )


def _step(
    options: SegmentationOptions,
    axis: str | None,
    state: SegmentationState,
    features: Array,
    labels: Array,
) -> tuple[SegmentationState, Array]:
    """One iteration, of which this device has some images."""
    if features.ndim != 4 or labels.ndim != 3 or len(features) != len(labels):
        raise ValueError(
            f"got features {features.shape} and labels {labels.shape}, expected "
            "[B, h, w, C] and [B, height, width]"
        )
    _check_features(state, features)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"got labels of {labels.dtype}, expected integers")
    features = _all(features, axis)
    mean = jnp.mean(features, axis=(0, 1, 2))
    variance = jnp.mean(jnp.square(features - mean[None, None, None]), axis=(0, 1, 2))
    normalized = _normalize(features, mean, variance)
    logits, pull_back = jax.vjp(lambda head: _logits(head, normalized), state.head)
    gradient_of_one = jax.value_and_grad(cross_entropy)
    sums, slopes = lax.map(
        lambda pair: gradient_of_one(*pair), (_own(logits, labels, axis), labels)
    )
    pixels = len(features) * math.prod(labels.shape[1:])
    (gradient,) = pull_back(_all(slopes, axis) / pixels)
    count = math.prod(features.shape[:3])
    unbiased = variance * (count / max(count - 1, 1))
    state = _update(state, gradient, options)._replace(
        mean=_moved(state.mean, mean), variance=_moved(state.variance, unbiased)
    )
    return state, jnp.sum(_all(sums, axis)) / pixels


def _all(x: Array, axis: str | None) -> Array:
    """The images of all devices."""
    return x if axis is None else lax.all_gather(x, axis, axis=0, tiled=True)


def _own(x: Array, like: Array, axis: str | None) -> Array:
    """This device's images, as many as `like` has."""
    if axis is None:
        return x
    start = lax.axis_index(axis) * len(like)
    return lax.dynamic_slice_in_dim(x, start, len(like))


def _moved(old: Array, new: Array) -> Array:
    return (1 - NORM_MOMENTUM) * old + NORM_MOMENTUM * new


def _update(
    state: SegmentationState, gradient: Head, options: SegmentationOptions
) -> SegmentationState:
    """One step of AdamW, PyTorch's: w ← w − lr·(m̂ / (√v̂ + ε) + decay·w)."""
    adam = optax.scale_by_adam(options.beta1, options.beta2, options.epsilon)
    before = optax.ScaleByAdamState(state.step, state.first_moment, state.second_moment)
    direction, after = adam.update(gradient, before)
    lr = learning_rate(state.step, options)
    head = jax.tree.map(
        lambda w, d: w - lr * (d + options.weight_decay * w), state.head, direction
    )
    assert isinstance(after, optax.ScaleByAdamState)
    return state._replace(
        head=head, first_moment=after.mu, second_moment=after.nu, step=after.count
    )


# --- Inference ------------------------------------------------------------------------


def patch_logits(
    state: SegmentationState, features: Float[Numbers, "B h w C"]
) -> Float[Array, "B h w classes"]:
    """Logits of patches, by the running statistics.

    Raises:
      ValueError: features of other channels than the head's.
    """
    features = _array(features)
    _check_features(state, features)
    return _patch_logits(state, features)


@jax.jit
def _patch_logits(
    state: SegmentationState, features: Float[Array, "B h w C"]
) -> Float[Array, "B h w classes"]:
    return _logits(state.head, _normalize(features, state.mean, state.variance))


def predict(
    state: SegmentationState,
    features: Float[Numbers, "B h w C"],
    size: tuple[int, int],
) -> Float[Array, "B height width classes"]:
    """Logits of every pixel of a window of `size`, by the running statistics.

    The grid of the padded window is stretched over the window without padding, as in
    the original: nothing is cut off.

    Args:
      state: the head.
      features: of patches.
      size: (height, width) in pixels.

    Raises:
      ValueError: as `patch_logits`.
    """
    return _upsampled(patch_logits(state, features), tuple(size))


@functools.partial(jax.jit, static_argnames="size")
def _upsampled(logits, size):
    return lax.map(lambda x: bilinear.resize(x, size), logits)


def merge_weights(
    length: int, size: int, *, crop: int, stride: int, patch: int = 14
) -> Float[np.ndarray, "size patches"]:
    """From the patch logits of all windows of one axis to the pixels of the result.

    Sliding inference resizes the patch logits of each window to the window's pixels,
    averages the windows where they overlap, and resizes to the size of the labels. Each
    of these is linear and treats rows and columns alike but apart (the number of
    windows over a pixel is that of its row times that of its column), so one small
    matrix per axis does all three, without an array as large as the resized image.

    Args:
      length: pixels of the resized image along the axis.
      size: pixels of the labels.
      crop: pixels of a window.
      stride: pixels between windows.
      patch: pixels of a patch.

    Returns:
      float64 weights whose rows sum to 1; columns are the patches of the first window,
      then those of the second one, and so on.
    """
    spans = windows(length, crop, stride)
    cover = np.zeros(length)
    for start, stop in spans:
        cover[start:stop] += 1
    parts = []
    for start, stop in spans:
        side = stop - start
        patches = (side + sum(center_padding(side, patch))) // patch
        part = np.zeros((length, patches))
        part[start:stop] = (
            bilinear.bilinear_weights(patches, side) / cover[start:stop, None]
        )
        parts.append(part)
    return bilinear.bilinear_weights(length, size) @ np.concatenate(parts, axis=1)


@jax.jit
def probabilities(
    logits: Float[Numbers, "windows_down windows_across h w classes"],
    rows: Float[Numbers, "height patches_down"],
    columns: Float[Numbers, "width patches_across"],
) -> Float[Array, "height width classes"]:
    """Class probabilities of an image from the patch logits of its windows.

    Args:
      logits: of every window, from top to bottom and from left to right.
      rows: `merge_weights` of the rows.
      columns: `merge_weights` of the columns.
    """
    down, across, h, w, classes = logits.shape
    sheet = jnp.transpose(logits, (0, 2, 1, 3, 4))
    sheet = sheet.reshape(down * h, across * w, classes)
    pixels = bilinear.weighted(
        jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(sheet)
    )
    return jax.nn.softmax(pixels, axis=-1)


def short_sides(crop: int, ratios: Sequence[float]) -> list[int]:
    """Pixels of the short side at each ratio, rounded down; `MultiScaleFlipAug`."""
    return [int(crop * ratio) for ratio in ratios]
