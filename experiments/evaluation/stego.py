"""STEGO: the protocols `stego_cityscapes` and `stego_potsdam3`.

    training images --tokens--> kept --mean, neighbors--> the images most like each
    image, one of its neighbors --steps--> head, probes --now and then--> mIoU
    the best state by it, and the last --mirrored, CRF--> clusters matched with classes

Source: mhamilton723/STEGO; SINDER's appendix G.1 and Table 7.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.evaluation import (
    clusterings,
    matching,
    segmenter,
    stego_settings,
    stego_training,
    unsupervised,
)
from experiments.evaluation.job import Job, Result
from experiments.evaluation.segmenter import Counts
from experiments.evaluation.unsupervised import Data
from sinder_jax.evals import stego
from sinder_jax.model import Model

POOLED = 256  # images whose tokens are averaged at a time
MOST_DIM = 4_096  # of the codes; a mistyped one would fill all memory


# --- Before anything is computed ------------------------------------------------------


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Fills in the config, picks the rows of Table 7, and lists and checks the data.

    Raises:
      FileNotFoundError: something is missing; says what is expected where.
      ValueError: a setting out of range, a backbone that a model is not, a mask that
        does not fit, too few images.
    """
    if not config.backbone:
        raise ValueError(
            f"config.backbone: got '', expected {', '.join(stego.BACKBONES)}: "
            "it picks the row of the paper's Table 7"
        )
    data = unsupervised.prepare(
        config, models, stego_settings.PUBLISHED[config.protocol], stego_settings.SHORT
    )
    filled, count = data.config, len(data.train)
    for key, least in (("iterations", 1), ("images_per_step", 2), ("dim", 1)):
        if filled[key] < least:
            raise ValueError(
                f"config.{key}: got {filled[key]}, expected at least {least}"
            )
    if filled.dim > MOST_DIM:
        raise ValueError(f"config.dim: got {filled.dim}, expected at most {MOST_DIM}")
    for backbone in data.backbones:
        stego_settings.options(filled, backbone)
    if count < filled.images_per_step:
        raise ValueError(
            f"{config.data}: got {count} training images, expected at least the "
            f"{filled.images_per_step} of a step; give --config.images_per_step=N"
        )
    if count < stego.POSITIVES.stop:
        raise ValueError(
            f"{config.data}: got {count} training images, expected at least "
            f"{stego.POSITIVES.stop}: one and its {len(stego.POSITIVES)} neighbors"
        )
    return data


# --- Evaluation -----------------------------------------------------------------------


def material(job: Job) -> stego_training.Material:
    """Computes tokens and neighbors, or finds the tokens again."""
    config = job.config
    train, *views = (
        unsupervised.tokens(job, split) for split in ("train", "val", "val mirrored")
    )
    pooled = np.concatenate(
        [
            train[i : i + POOLED].mean((1, 2), dtype=np.float32)
            for i in range(0, len(train), POOLED)
        ]
    )
    labels = unsupervised.masks_of(job.data.found.val, config, config.test_size)
    return stego_training.Material(train, views, labels, stego.nearest(pooled))


def run(job: Job) -> Result:
    """Trains a head from every seed; evaluates its best state and its last."""
    job = job._replace(config=job.data.config)
    backbone = unsupervised.backbone_of(job)
    config, given = job.config, material(job)
    of_seeds: list[Counts] = []
    steps: list[int] = []
    shown: Sequence[np.ndarray] = ()
    for seed in range(config.seed, config.seed + config.seeds):
        heads = stego_training.train(job, given, backbone, seed)
        best, last = map(stego_training.segmenter_of, (heads.best, heads.last))
        name, inputs = f"{backbone}_seed{seed}", (given.views, given.labels)
        counts = segmenter.counts(job, name, best, *inputs)
        of_last = counts
        if heads.best_step != config.iterations:
            of_last = segmenter.counts(job, f"{name}_last", last, *inputs)
        counts = {**counts, **{f"{key}_last": x for key, x in of_last.items()}}
        if config.baselines:
            counts |= clusterings.counts(
                job, seed, given.train, given.views, given.labels
            )
        if config.pictures and not shown:
            rows = range(min(config.pictures, len(given.labels)))
            shown = segmenter.predictions(job, best, given.views, rows)
        of_seeds.append(counts)
        steps.append(heads.best_step)
    return matching.result(job, of_seeds, _evaluated(job, backbone, steps), shown)


def _evaluated(job: Job, backbone: str, steps: Sequence[int]) -> dict[str, Any]:
    """What the method has to tell, for the reader."""
    config = job.config
    row = stego_settings.options(config, backbone).row
    chosen = " and ".join(map(str, steps))
    return {
        "row of Table 7": backbone,
        "weights": " ".join(f"{x:g}" for x in row.weights),
        "shifts": " ".join(f"{x:g}" for x in row.shifts),
        "code": config.dim,
        "iterations": config.iterations,
        "images per step": config.images_per_step,
        "learning rate": config.lr,
        "state": (
            f"after {chosen} steps, the best by the labels of these images, as in the "
            "original; metrics with _last are those of the last state"
        ),
        "seeds": config.seeds,
    }
