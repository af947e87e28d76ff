"""How a segmentation head is trained and applied: as published, or in minutes.

config, data --settle--> Schedule: every number that the config leaves open is filled in
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.evaluation import images
from sinder_jax.data import decode, masks
from sinder_jax.data.scenes import SAMPLES
from sinder_jax.evals.segmentation import SegmentationOptions

# By protocol: what 0, or an empty text, of a key of the config stands for.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "segmentation_linear": {"crop": 512, "stride": 341, "ratios": "1.0"},
    "segmentation_multiscale": {
        "crop": 640,
        "stride": 320,
        "ratios": "1.0,1.32,1.73,2.28,3.0",
    },
}
TRAINING = {"iterations": 40_000, "images_per_step": 16, "lr": 1e-3}
# On drawn scenes, `SAMPLES`, instead of these.
SHORT = {"crop": 160, "iterations": 60, "images_per_step": 8, "lr": 1e-2}
SHORT_RATIOS = {"segmentation_linear": "1.0", "segmentation_multiscale": "1.0,1.32"}
WARMUP = 1_500 / 40_000  # share of the iterations
MODES = ("slide", "whole")
MOST_RATIO = 8.0  # a mistyped one would fill all memory


class Schedule(NamedTuple):
    """Numbers of one evaluation.

    Attributes:
      crop: pixels of a training image, of a window, and of an image's short side at
        ratio 1.
      stride: pixels from a window to the next one.
      whole: True to take an image at once, not window by window.
      train_ratios: least and greatest one of training images.
      ratios: of the images to predict.
      flips: False, and True if the mirrored image is predicted, too.
      images_per_step: of training.
      options: of the head.
    """

    crop: int
    stride: int
    whole: bool
    train_ratios: tuple[float, float]
    ratios: tuple[float, ...]
    flips: tuple[bool, ...]
    images_per_step: int
    options: SegmentationOptions


def settle(config: ConfigDict) -> Schedule:
    """Fills in what the config leaves open and checks every number.

    Raises:
      ValueError: a number out of range; names the key.
    """
    images.check_common(config)
    protocol, drawn = config.protocol, config.data in SAMPLES
    published = {**TRAINING, **PUBLISHED[protocol]}
    open_keys = {**published, **(SHORT if drawn else {})}
    if drawn:
        open_keys["ratios"] = SHORT_RATIOS[protocol]
    values = {key: config[key] or value for key, value in open_keys.items()}
    crop = values["crop"]
    if not config.stride:  # the same share of the crop
        values["stride"] = crop * published["stride"] // published["crop"]
    most = decode.LARGEST_SIDE
    _check("crop", crop, 1 <= crop <= most, f"1 to {most}")
    _check("stride", values["stride"], 1 <= values["stride"] <= crop, f"1 to {crop}")
    low, high = config.least_ratio, config.greatest_ratio
    _check("least_ratio", low, 0 < low <= high, f"above 0 and at most {high}")
    _check("greatest_ratio", high, high <= MOST_RATIO, f"at most {MOST_RATIO}")
    _check("mode", config.mode, config.mode in MODES, " or ".join(MODES))
    for key in ("iterations", "images_per_step"):
        _check(key, values[key], values[key] >= 1, "at least 1")
    for key in ("blocks", "seeds", "save_every"):
        _check(key, config[key], config[key] >= 1, "at least 1")
    _check("pictures", config.pictures, config.pictures >= 0, "at least 0")
    _check("lr", values["lr"], 0 < values["lr"] < math.inf, "above 0")
    decay = config.weight_decay
    _check("weight_decay", decay, 0 <= decay < math.inf, "at least 0")
    count, most = config.num_classes, masks.MOST_CLASSES
    _check("num_classes", count, count == 0 or 2 <= count <= most, f"0, or 2 to {most}")
    total = values["iterations"]
    options = SegmentationOptions(
        total_steps=total,
        lr=values["lr"],
        warmup_steps=round(total * WARMUP),
        weight_decay=config.weight_decay,
    )
    return Schedule(
        crop,
        values["stride"],
        config.mode == "whole",
        (low, high),
        _ratios(values["ratios"]),
        (False, True) if config.flip else (False,),
        values["images_per_step"],
        options,
    )


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = (math.nan,)
    good = all(0 < ratio <= MOST_RATIO for ratio in ratios)
    _check("ratios", text, good, f"numbers above 0 and up to {MOST_RATIO}, with commas")
    return ratios


def _check(key: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"config.{key}: got {value!r}, expected {expected}")
