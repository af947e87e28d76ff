"""What STEGO is told: the row of Table 7, and the numbers of a training.

config, name of a row --options--> weights, shifts, learning rates

Source: SINDER's Table 7; mhamilton723/STEGO configs/train_config.yml.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sinder_jax.evals import stego
from sinder_jax.evals.stego import Row, StegoOptions

TRAINING = {
    "test_size": 560,
    "train_size": 392,
    "iterations": 5_000,
    "images_per_step": 16,
    "lr": 5e-4,
    "probe_lr": 5e-3,
}
# By protocol: what 0, or an empty text, of a key of the config stands for.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "stego_cityscapes": {**TRAINING, "crops": "five"},
    "stego_potsdam3": {**TRAINING, "crops": "none"},
}
# On the samples, instead of these. The shifts are for ViT-S, whose tokens have a mean
# cosine of 0.5: by those of Table 7 nearly all pairs would attract, and codes collapse.
SHORT = {
    "crops": "none",
    "test_size": 224,
    "train_size": 224,
    "iterations": 200,
    "images_per_step": 8,
    "lr": 2e-3,
    "probe_lr": 1.5e-2,
    "shifts": "0.8,0.65,0.95",
}
EVALUATE_EVERY = 100  # steps, if that is at most a quarter of a pass over the images


def options(config: ConfigDict, backbone: str) -> StegoOptions:
    """How a head is trained.

    Args:
      config: of the protocol, with every number filled in.
      backbone: name of a row of Table 7, which `config.weights` and `config.shifts`
        replace.

    Raises:
      ValueError: a number out of range; names the key.
    """
    row = stego.TABLE[config.protocol.removeprefix("stego_"), backbone]
    row = Row(
        _three("weights", config.weights, row.weights),
        _three("shifts", config.shifts, row.shifts),
    )
    try:
        return StegoOptions(
            row,
            lr=config.lr,
            probe_lr=config.probe_lr,
            dropout=config.dropout,
            samples=config.samples,
            pointwise=config.pointwise,
        )
    except ValueError as error:
        raise ValueError(f"config: {error}") from None


def _three(
    key: str, text: str, published: tuple[float, float, float]
) -> tuple[float, float, float]:
    if not text:
        return published
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError:
        first = second = third = math.nan
    if not all(map(math.isfinite, (first, second, third))):
        raise ValueError(
            f"config.{key}: got {text!r}, expected three numbers with commas, of the "
            "negatives, of the neighbors and of an image with itself"
        )
    return first, second, third


def evaluate_every(config: ConfigDict, images: int) -> int:
    """Steps between evaluations: a hundred, or a whole pass of few images.

    train_segmentation.py: `val_check_interval` is dropped where it exceeds a quarter of
    a pass.
    """
    passes = images // config.images_per_step
    return EVALUATE_EVERY if EVALUATE_EVERY <= passes // 4 else passes
