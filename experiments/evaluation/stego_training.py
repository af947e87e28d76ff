"""Trains STEGO's head and probes, and keeps the state that does best.

tokens, neighbors, masks --batches, steps--> head, linear probe, centroids
the state after so many steps --validation images--> mIoU --the best--> a file
"""

import hashlib
import json
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization
from jaxtyping import Array, Float, Int32, UInt8

from experiments.evaluation import (
    matching,
    segmenter,
    stego_batches,
    stego_settings,
    training,
)
from experiments.evaluation.job import Job
from experiments.evaluation.scene_training import digest
from experiments.evaluation.segmenter import Counts, Segmenter
from experiments.study.cache import read_arrays, write_arrays
from sinder_jax import placement
from sinder_jax.evals import stego

SCORE = "cluster_miou"  # of the validation images, by which a state is chosen


class Material(NamedTuple):
    """What the heads of a model are trained on and chosen by.

    Attributes:
      train: tokens of the training images.
      views: of the validation images, and of these mirrored.
      labels: masks of the validation images.
      neighbors: of each training image, the nearest first.
    """

    train: Float[np.ndarray, "n h w D"]
    views: Sequence[Float[np.ndarray, "m H W D"]]
    labels: UInt8[np.ndarray, "m size size"]
    neighbors: Int32[np.ndarray, "n _"]


class Heads(NamedTuple):
    """What a training ends with.

    Attributes:
      best: params of the state with the largest mIoU of clusters on the validation
        images; the first of several.
      best_step: steps before it.
      last: params after the last step.
    """

    best: stego.Params
    best_step: int
    last: stego.Params


def train(job: Job, given: Material, backbone: str, seed: int) -> Heads:
    """Trains one head with its probes, from where an earlier start was stopped.

    The head is small and its loss takes means over the whole batch, so a step runs on
    the first device; any number of devices gives the same bits.

    Raises:
      FloatingPointError: it diverged.
      UnreadableImage: a mask cannot be decoded.
    """
    config, data = job.config, job.data
    name = f"{backbone}_seed{seed}"
    device = placement.first()
    run = stego.make_step(stego_settings.options(config, backbone))
    start = stego.init(
        jax.random.key(seed), given.train.shape[-1], data.num_classes, config.dim
    )
    key = _key(job, given, backbone, seed)
    told = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    best = Best(job.folder / f"{name}_best_{told[:16]}.npz", start.params)

    def step(state: Any, batch: stego_batches.Batch) -> tuple[Any, Array]:
        state, losses = run(state, *jax.device_put(batch, device))
        return state, losses.total

    def evaluate(state: Any) -> training.Evaluation:
        counts = segmenter.quick_counts(
            job, segmenter_of(state.params), given.views[:1], given.labels
        )
        scores = _without_crf(counts)
        best.keep(state.params, int(state.adam.count), scores[SCORE])
        return training.Evaluation(scores, {})

    def batches(first: int) -> Generator[stego_batches.Batch, None, None]:
        if not first:
            best.clear()
        return stego_batches.batches(
            data.train, given.train, given.neighbors, config, seed, first=first
        )

    plan = training.Plan(
        folder=job.folder / name,
        key=key,
        total=config.iterations,
        save_every=config.save_every,
        evaluate_every=stego_settings.evaluate_every(config, len(data.train)),
        label=f"training {name}",
    )
    trained = training.train(
        plan,
        jax.device_put(start, device),
        step,
        batches,
        evaluate,
        progress=job.progress,
        stopping=job.stopping,
    )
    return _finished(plan, trained, best, config.lr)


def _finished(
    plan: training.Plan, trained: training.Trained, best: "Best", lr: float
) -> Heads:
    last = jax.tree.map(np.asarray, trained.state.params)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(last)):
        raise FloatingPointError(
            f"{plan.label} diverged, its weights are not finite: give a smaller "
            f"--config.lr than {lr:g}, and another --workdir"
        )
    scores = {step: each[SCORE] or 0.0 for step, each in trained.history.items()}
    wanted = max(sorted(scores), key=lambda step: scores[step])  # the first of several
    found = best.read()
    if found is None or found[1] != wanted:
        raise training.Unusable(
            plan.folder, f"a training whose best state, {best.path}, is lost"
        )
    return Heads(*found, last)


def _key(job: Job, given: Material, backbone: str, seed: int) -> dict[str, Any]:
    """What a training depends on, beside the config and the model."""
    return {
        "seed": seed,
        "backbone": backbone,
        "tokens": list(given.train.shape),
        "classes": job.data.num_classes,
        "training images": digest(job.data.train),
        "validation images": digest(job.data.found.val),
    }


def _without_crf(counts: Counts) -> dict[str, float]:
    """Scores by the names of the headline."""
    names = tuple(name.removesuffix("_raw") for name in counts)
    total = np.stack([each.sum(0) for each in counts.values()])
    return matching.score(names, total, 0)


def segmenter_of(params: stego.Params) -> Segmenter:
    """What evaluates a state."""
    head, linear, centroids = jax.tree.map(np.asarray, params)
    return Segmenter(stego.codes, head, centroids, linear, stego.ALPHA)


class Best:
    """The params with the largest score of a training, in a file.

    A start after a kill computes what was lost again, with the same scores, so the file
    may be ahead of the training, but never holds what the training would not.
    """

    def __init__(self, path: Path, like: stego.Params):
        self.path, self._like = path, like
        kept = read_arrays(path)
        self._score = -math.inf if kept is None else float(kept["score"])

    def clear(self) -> None:
        """Forgets what a training left that begins anew."""
        self.path.unlink(missing_ok=True)
        self._score = -math.inf

    def keep(self, params: stego.Params, step: int, score: float) -> None:
        """Writes params that do better than those in the file."""
        if score <= self._score:
            return
        self._score = score
        told = serialization.to_bytes(jax.tree.map(np.asarray, params))
        arrays = {
            "params": np.frombuffer(told, np.uint8),
            "step": np.array(step),
            "score": np.array(score),
        }
        write_arrays(self.path, arrays)

    def read(self) -> tuple[stego.Params, int] | None:
        """Params and their step; None if the file is missing or damaged."""
        kept = read_arrays(self.path)
        if kept is None:
            return None
        params = serialization.from_bytes(self._like, kept["params"].tobytes())
        return params, int(kept["step"])
