"""k-NN classification of class tokens: the protocol `knn`.

    train, val --class token after the final norm--> bank, queries
    bank, queries --votes--> top-1 and top-5 for each K

Source: dinov2/eval/knn.py, SINDER's appendix G.3. Computed in float32, where the
original multiplies in float16; the evaluation may differ by hundredths of a percent.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.evaluation import images
from experiments.evaluation.job import Job, Result, Scores
from sinder_jax.data import decode, labelled
from sinder_jax.data.labelled import Classes, Splits
from sinder_jax.evals import features, knn
from sinder_jax.model import Model

TOP = (1, 5)


def prepare(config: ConfigDict, models: Sequence[Model]) -> Splits:
    """Lists the photographs of both splits; errors as `labelled.open_classes`.

    Raises:
      ValueError: a setting out of range; a K beyond the training images.
    """
    images.check_options(config, models)
    ks = ks_of(config)
    _named("temperature", knn.check_temperature, config.temperature)
    splits = labelled.open_classes(config.data)
    _named("ks", knn.check_ks, ks, len(splits.train.photographs))
    return splits


def _named(key: str, check: Callable[..., None], *values: Any) -> None:
    try:
        check(*values)
    except ValueError as error:
        raise ValueError(f"config.{key}: {error}") from None


def ks_of(config: ConfigDict) -> list[int]:
    """The numbers of neighbors in `config.ks`."""
    try:
        return sorted({int(k) for k in config.ks.split(",")})
    except ValueError:
        raise ValueError(
            f"config.ks: got {config.ks!r}, expected whole numbers separated by commas"
        ) from None


def run(job: Job) -> Result:
    """Classifies the validation images by their neighbors among the training images."""
    train, val = job.data
    bank = class_tokens(job, "train", train)
    queries = class_tokens(job, "val", val)
    votes = knn.classify(
        bank,
        train.labels,
        queries,
        ks=ks_of(job.config),
        temperature=job.config.temperature,
        num_classes=len(train.names),
    )
    hits = {k: hits_of(each, val.labels) for k, each in votes.items()}
    counts = np.stack([hits[k] for k in votes], axis=1)
    return Result(
        counts=counts[None].astype(np.float64),
        score=functools.partial(score, tuple(votes)),
        headline=("top1", "top5"),
        unit="%",
        evaluated=_evaluated(job, hits),
    )


def _evaluated(job: Job, hits: dict[int, np.ndarray]) -> dict[str, Any]:
    train, val = job.data
    told = {
        "images": len(val.labels),
        "training images": len(train.labels),
        "classes": len(train.names),
        "K of top1": max(hits, key=lambda k: hits[k][:, 0].sum()),
        "image size": job.config.image_size,
    }
    if absent := val.absent():
        told["classes without images"] = absent
    return told


def class_tokens(job: Job, name: str, split: Classes) -> np.ndarray:
    """Class tokens after the final norm, [n, D]."""
    config, model = job.config, job.model
    crop = functools.partial(
        decode.evaluation_crop, resize=config.resize, size=config.image_size
    )
    return images.cached(
        job,
        name,
        split.photographs,
        crop,
        (model.config.embed_dim,),
        {"features": "class token", "resize": config.resize, "size": config.image_size},
        blocks=features.last_blocks(model.config, 1),
        of=features.class_token,
        batch_axis=0,
    )


def hits_of(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where a label is among the 1 and the 5 largest votes, else 0; [Q, 2].

    Of equal votes the class with the lower number comes first.
    """
    order = np.argsort(-votes, axis=1, kind="stable")
    right = order == labels[:, None]
    return np.stack([right[:, :n].any(axis=1) for n in TOP], axis=1)


def score(ks: Sequence[int], total: np.ndarray, num_images: int) -> Scores:
    """Percent of the images, for each K; `top1` is the best over K, as in the paper."""
    share = 100 * total / num_images
    found = {"top1": float(share[:, 0].max()), "top5": float(share[:, 1].max())}
    for k, (top1, top5) in zip(ks, share, strict=True):
        found |= {f"top1_k{k}": float(top1), f"top5_k{k}": float(top5)}
    return found
