"""What CAUSE is told: the numbers of its stages, and what they mean for a data set.

config, images --check--> thresholds, order of the images, optimizer of each stage

Source: ByungKwanLee/Causal-Unsupervised-Segmentation, its scripts' defaults.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.evaluation.cause_batches import Order
from sinder_jax.evals import modularity
from sinder_jax.evals.cause_head import PROJECTED
from sinder_jax.evals.cause_optimizer import Options
from sinder_jax.evals.contrastive import Thresholds
from sinder_jax.model import Model

TRAINING = {
    "train_size": 322,
    "test_size": 322,
    "gpus": 4,
    "images_per_step": 16,
    "lr": 1e-3,
    "mediator_epochs": 1,
    "front_door_epochs": 2,
    "fine_tuning_epochs": 5,
    "codes": 2_048,
    "bank_size": 100,
    "thresholds": "0.3,0.1",
}
# By protocol: what 0, or an empty text, of a key of the config stands for.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "cause_cityscapes": {**TRAINING, "crops": "five"},
    "cause_voc": {**TRAINING, "crops": "super"},
}
# On the samples, instead of these.
SHORT = {
    "crops": "none",
    "train_size": 224,
    "test_size": 224,
    "gpus": 1,
    "images_per_step": 4,
    "lr": 1e-3,
    "mediator_epochs": 1,
    "front_door_epochs": 12,
    "fine_tuning_epochs": 5,
    # After more steps, or of 256 codes, about five are left that any token is near to.
    "codes": 2_048,
    "bank_size": 10,
    # For ViT-S, whose tokens have a mean cosine of 0.5: by the published, most pairs
    # attract, and two clusters are left.
    "thresholds": "0.8,0.6",
}
LARGEST_BANK = 60  # GB
HALVED = 2  # epochs of the third stage after which the learning rate is halved
STAGES = ("mediator", "front_door", "fine_tuning")


def check(filled: ConfigDict, count: int, models: Sequence[Model]) -> None:
    """Refuses what cannot be trained.

    Args:
      filled: the config, with every number filled in.
      count: training images.
      models: to evaluate.

    Raises:
      ValueError: a setting out of range, or too few images.
    """
    least = {f"{stage}_epochs": 1 for stage in STAGES}
    least |= {"gpus": 1, "images_per_step": 1, "codes": 2, "bank_size": 1}
    for key, lowest in least.items():
        if filled[key] < lowest:
            raise ValueError(
                f"config.{key}: got {filled[key]}, expected at least {lowest}"
            )
    for key, low, holds in (
        ("lr", "above 0", 0 < filled.lr < math.inf),
        ("weight_decay", "at least 0", 0 <= filled.weight_decay < math.inf),
        ("clip", "at least 0", 0 <= filled.clip < math.inf),
    ):
        if not holds:
            raise ValueError(f"config.{key}: got {filled[key]}, expected {low}")
    if filled.gpus > count:
        raise ValueError(
            f"config.gpus: got {filled.gpus} for {count} training images, of which "
            "each has a share; expected at most as many"
        )
    bank = 4 * filled.codes * filled.bank_size * PROJECTED / 1e9
    if bank > LARGEST_BANK:
        raise ValueError(
            f"config.codes and config.bank_size: got {filled.codes} and "
            f"{filled.bank_size}, a bank of {bank:,.0f} GB, expected at most "
            f"{LARGEST_BANK} GB"
        )
    thresholds(filled)
    if filled.train_size != filled.test_size:
        raise ValueError(
            f"config.train_size and config.test_size: got {filled.train_size} and "
            f"{filled.test_size}, expected the same: the head has a learned query for "
            "each token"
        )
    for model in models:
        patch = model.config.patch_size
        if filled.train_size < patch * modularity.CELL:
            raise ValueError(
                f"config.train_size: got {filled.train_size}, expected at least "
                f"{patch * modularity.CELL}: one cell of {modularity.CELL} x "
                f"{modularity.CELL} tokens"
            )
    if count < filled.images_per_step:
        raise ValueError(
            f"{filled.data}: got {count} training images, expected at least the "
            f"{filled.images_per_step} of a step; give --config.images_per_step=N"
        )


def thresholds(config: ConfigDict) -> Thresholds:
    """Which codes attract and which repel, from `config.thresholds`.

    Raises:
      ValueError: not two cosines, or the second above the first.
    """
    try:
        positive, negative = (float(part) for part in config.thresholds.split(","))
    except ValueError:
        positive = negative = math.nan
    if not -1 <= negative <= positive <= 1:
        raise ValueError(
            f"config.thresholds: got {config.thresholds!r}, expected two cosines with "
            "a comma: tokens attract whose code vectors have more than the first, and "
            "repel below the second, which is at most as large"
        )
    return Thresholds(positive, negative)


def order(config: ConfigDict, count: int, seed: int) -> Order:
    """Which images the steps of a training see: a share of `count` in each epoch.

    The released scripts start a process on each of four GPUs, which never exchange
    gradients, and keep the first one's model. It sees a quarter of the images in an
    epoch, with four times the learning rate.
    """
    share = math.ceil(count / config.gpus)
    steps = math.ceil(share / config.images_per_step)
    return Order(count, config.images_per_step, steps, seed)


def options(config: ConfigDict, stage: str, steps: int) -> Options:
    """The optimizer of a stage.

    Args:
      config: of the protocol, with every number filled in.
      stage: one of `STAGES`.
      steps: of an epoch.
    """
    lr = config.lr * config.gpus
    if stage == "mediator":
        return Options(lr)
    halve_every = HALVED * steps if stage == "fine_tuning" else 0
    return Options(lr, config.weight_decay, config.clip, halve_every)
