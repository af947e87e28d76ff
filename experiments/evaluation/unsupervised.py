"""What the unsupervised protocols share: scenes as squares, and their tokens.

    scenes --crops, squares--> photographs --last block, normed--> tokens, kept
    scenes --squares--> masks

`segmenter` and `matching` make clusters of the tokens, and a result of these.
Source: SINDER's appendix G.1 and G.2.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from experiments.evaluation import images, survey
from experiments.evaluation.job import Job
from sinder_jax import cli
from sinder_jax.data import crops, decode, scenes
from sinder_jax.data.scenes import SAMPLES, AnyScene, Scenes
from sinder_jax.evals import features, stego
from sinder_jax.evals.features import BlockFeatures
from sinder_jax.model import Model

CROPS: Mapping[str, Callable[[Sequence[AnyScene]], Sequence[Any]]] = {
    "none": list,
    "five": crops.five,
    "super": crops.super_crops,
}

# What a protocol is published for, by the first words of `Scenes.title`.
MEANT = {
    "stego_cityscapes": "Cityscapes",
    "stego_potsdam3": "Potsdam-3",
    "cause_cityscapes": "Cityscapes",
    "cause_voc": "VOC2012",
}


class Data(NamedTuple):
    """What `prepare` found.

    Attributes:
      found: the scenes.
      train: training images, cropped as the protocol says.
      num_classes: labels are below it; there are as many clusters.
      config: with every number filled in.
      models: to evaluate.
      backbones: one of `stego.BACKBONES` for each model; empty where none was given.
    """

    found: Scenes
    train: Sequence[AnyScene]
    num_classes: int
    config: ConfigDict
    models: Sequence[Model]
    backbones: Sequence[str]


# --- Before anything is computed ------------------------------------------------------


def prepare(
    config: ConfigDict,
    models: Sequence[Model],
    published: Mapping[str, Any],
    short: Mapping[str, Any],
) -> Data:
    """Fills in the config, lists the scenes and reads every mask once.

    Args:
      config: of the protocol.
      models: to evaluate.
      published: what 0, or an empty text, of a key stands for.
      short: the same on `SAMPLES`.

    Raises:
      FileNotFoundError: something is missing; says what is expected where.
      ValueError: a setting out of range; a backbone that a model is not; a mask that
        does not fit.
    """
    names = backbones(config.backbone, models)
    filled = config.copy_and_resolve_references().unlock()
    for key, value in (short if config.data in SAMPLES else published).items():
        filled[key] = config[key] or value
    filled.lock()
    images.check_common(filled)
    for key, least in (("seeds", 1), ("save_every", 1), ("pictures", 0)):
        if filled[key] < least:
            raise ValueError(
                f"config.{key}: got {filled[key]}, expected at least {least}"
            )
    if filled.crops not in CROPS:
        raise ValueError(
            f"config.crops: got {filled.crops!r}, expected one of {', '.join(CROPS)}"
        )
    for key in ("train_size", "test_size"):
        for model in models:
            decode.check_side(f"config.{key}", filled[key], model.config.patch_size)
    found = scenes.open_scenes(filled.data, train_list=filled.train_list)
    if found.lacks:
        cli.warn(f"{filled.data}: {found.lacks}")
    here, meant = found.title.partition(",")[0], MEANT[filled.protocol]
    if here in {*MEANT.values(), "ADE20k"} - {meant}:
        cli.warn(
            f"{filled.data} holds {here}: its classes count, but the crops and numbers "
            f"of {filled.protocol} are those for {meant}"
        )
    count, _ = survey.check_masks(filled, found)
    train = CROPS[filled.crops](found.train)
    return Data(found, train, count, filled, models, names)


def backbones(text: str, models: Sequence[Model]) -> list[str]:
    """What each model counts as, from `config.backbone`.

    Raises:
      ValueError: one that is not known; another number than of models; one that
        contradicts a model.
    """
    known = ", ".join(stego.BACKBONES)
    names = [part.strip() for part in text.split(",")] if text else [""]
    if text and any(name not in stego.BACKBONES for name in names):
        raise ValueError(
            f"config.backbone: got {text!r}, expected {known}: one for all "
            "checkpoints, or one for each with commas"
        )
    if len(names) == 1:
        names *= len(models)
    if len(names) != len(models):
        raise ValueError(
            f"config.backbone: got {len(names)} for {len(models)} checkpoints, "
            "expected one for all or one for each"
        )
    for name, model in zip(names, models, strict=True):
        registers = model.config.num_register_tokens
        if (name == "dinov2_reg" and not registers) or (name == "dinov2" and registers):
            raise ValueError(
                f"config.backbone: got {name} for {model.path}, a model with "
                f"{registers} registers; expected one of {known}"
            )
    return names


def backbone_of(job: Job) -> str:
    """What the job's checkpoint counts as; empty if nothing was given."""
    data: Data = job.data
    checkpoint = job.origin or job.model
    (found,) = (
        name
        for model, name in zip(data.models, data.backbones, strict=True)
        if model is checkpoint
    )
    return found


# --- Tokens and masks -----------------------------------------------------------------


def tokens(job: Job, split: str) -> Float[np.ndarray, "n h w D"]:
    """Patch tokens of the last block after the final norm; kept on the disk.

    Args:
      job: its data is a `Data`.
      split: "train", "val" or "val mirrored".

    Returns:
      A memory map; "val mirrored" has the tokens of mirrored images, as they come.
    """
    config, model = job.config, job.model
    size = config.train_size if split == "train" else config.test_size
    side = size // model.config.patch_size
    of = job.data.train if split == "train" else job.data.found.val
    mirrored = split == "val mirrored"
    square = functools.partial(
        _square, size=size, squash=config.squash, mirrored=mirrored
    )
    return images.cached(
        job,
        split,
        of,
        square,
        (side, side, model.config.embed_dim),
        {
            "features": "patch tokens",
            "square": size,
            "squash": config.squash,
            "mirrored": mirrored,
        },
        blocks=features.last_blocks(model.config, 1),
        of=_patches,
        batch_axis=0,
    )


def _square(
    scene: tuple[np.ndarray, np.ndarray], *, size: int, squash: bool, mirrored: bool
) -> UInt8[np.ndarray, "size size 3"]:
    pixels = crops.square(scene[0], size, squash=squash)
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels


def _patches(found: BlockFeatures) -> Float[Array, "B h w D"]:
    return found.patches[-1]


def masks_of(
    some: Sequence[AnyScene], config: ConfigDict, size: int
) -> UInt8[np.ndarray, "n size size"]:
    """The masks of some scenes as squares; 255 is ignored."""
    return np.stack(
        [crops.square(each.read_mask(), size, squash=config.squash) for each in some]
    )
