"""STEGO: the protocols `stego_cityscapes` and `stego_potsdam3`.

    training images --tokens--> kept --mean, neighbors--> the images most like each
    image, one of its neighbors --steps--> head, probes --now and then--> mIoU
    the best state by it, and the last --mirrored, CRF--> clusters matched with classes

Source: mhamilton723/STEGO; SINDER's appendix G.1 and Table 7.
"""

import functools
import hashlib
import json
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization
from jaxtyping import Array, Float, Int32, UInt8
from ml_collections import ConfigDict

from experiments.evaluation import clusterings, stego_batches, training, unsupervised
from experiments.evaluation.job import Job, Result
from experiments.evaluation.scene_training import digest
from experiments.evaluation.unsupervised import Counts, Segmenter
from experiments.study.cache import read_arrays, write_arrays
from sinder_jax import placement
from sinder_jax.evals import stego
from sinder_jax.evals.stego import Row, StegoOptions
from sinder_jax.model import Model

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
# On the samples, instead of these.
SHORT = {
    "crops": "none",
    "test_size": 224,
    "train_size": 224,
    "iterations": 200,
    "images_per_step": 16,
    "lr": 5e-4,
    "probe_lr": 5e-3,
}
EVALUATE_EVERY = 100  # steps, if that is at most a quarter of a pass over the images
POOLED = 256  # images whose tokens are averaged at a time
SCORE = "cluster_miou"  # of the validation images, by which a state is chosen


class Data(NamedTuple):
    """What `prepare` found.

    Attributes:
      shared: by all unsupervised protocols.
      models: to evaluate.
      rows: of Table 7, by name: the backbone that each model counts as.
    """

    shared: unsupervised.Data
    models: Sequence[Model]
    rows: Sequence[str]


# --- Before anything is computed ------------------------------------------------------


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Picks the rows of Table 7, fills in the config, and lists and checks the data.

    Raises:
      FileNotFoundError: something is missing; says what is expected where.
      ValueError: a setting out of range, a backbone that a model is not, a mask that
        does not fit, too few images.
    """
    rows = backbones(config.backbone, models)
    shared = unsupervised.prepare(config, models, PUBLISHED[config.protocol], SHORT)
    filled, count = shared.config, len(shared.train)
    for key, least in (("iterations", 1), ("images_per_step", 2), ("dim", 1)):
        if filled[key] < least:
            raise ValueError(
                f"config.{key}: got {filled[key]}, expected at least {least}"
            )
    for row in rows:
        options(filled, row)
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
    return Data(shared, models, rows)


def backbones(text: str, models: Sequence[Model]) -> list[str]:
    """The backbone that each model counts as, from `config.backbone`.

    Raises:
      ValueError: none is given, or one that is not known; another number than of
        models; one that contradicts a model.
    """
    names = [part.strip() for part in text.split(",")]
    known = ", ".join(stego.BACKBONES)
    if any(name not in stego.BACKBONES for name in names):
        raise ValueError(
            f"config.backbone: got {text!r}, expected {known}: it picks the row of "
            "the paper's Table 7; give one for all checkpoints, or one for each with "
            "commas"
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


# --- Training -------------------------------------------------------------------------


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


def material(job: Job) -> Material:
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
    return Material(train, views, labels, stego.nearest(pooled))


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
    run = stego.make_step(options(config, backbone))
    start = stego.init(
        jax.random.key(seed), given.train.shape[-1], data.num_classes, config.dim
    )
    key = {
        "seed": seed,
        "backbone": backbone,
        "tokens": list(given.train.shape),
        "classes": data.num_classes,
        "training images": digest(data.train),
        "validation images": digest(data.found.val),
    }
    told = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    best = _Best(job.folder / f"{name}_best_{told[:16]}.npz", start.params)

    def step(state: Any, batch: stego_batches.Batch) -> tuple[Any, Array]:
        state, losses = run(state, *jax.device_put(batch, device))
        return state, losses.total

    def evaluate(state: Any) -> training.Evaluation:
        segmenter = _segmenter(state.params)
        counts = unsupervised.quick_counts(job, segmenter, given.views[0], given.labels)
        scores = _without_crf(counts)
        best.keep(state.params, int(state.adam.count), scores[SCORE])
        return training.Evaluation(scores, {})

    plan = training.Plan(
        folder=job.folder / name,
        key=key,
        total=config.iterations,
        save_every=config.save_every,
        evaluate_every=evaluate_every(config, len(data.train)),
        label=f"training {name}",
    )
    trained = training.train(
        plan,
        jax.device_put(start, device),
        step,
        functools.partial(_batches, job, given, seed),
        evaluate,
        progress=job.progress,
        stopping=job.stopping,
    )
    last = jax.tree.map(np.asarray, trained.state.params)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(last)):
        raise FloatingPointError(
            f"training {name} diverged, its weights are not finite: give a smaller "
            f"--config.lr than {config.lr:g}, and another --workdir"
        )
    found = best.read()
    if found is None:
        raise training.Unusable(plan.folder, f"no whole best state of {name}")
    return Heads(*found, last)


def evaluate_every(config: ConfigDict, images: int) -> int:
    """Steps between evaluations: a hundred, or a whole pass of few images.

    train_segmentation.py: `val_check_interval` is dropped where it exceeds a quarter of
    a pass.
    """
    passes = images // config.images_per_step
    return EVALUATE_EVERY if EVALUATE_EVERY <= passes // 4 else passes


def _batches(
    job: Job, given: Material, seed: int, first: int
) -> Generator[stego_batches.Batch, None, None]:
    config = job.config
    return stego_batches.batches(
        job.data.train,
        given.train,
        given.neighbors,
        config,
        seed=seed,
        first=first,
    )


def _without_crf(counts: Counts) -> dict[str, float]:
    """Scores by the names of the headline."""
    names = tuple(name.removesuffix("_raw") for name in counts)
    total = np.stack([each.sum(0) for each in counts.values()])
    return unsupervised.score(names, total, 0)


def _segmenter(params: stego.Params) -> Segmenter:
    head, linear, centroids = jax.tree.map(np.asarray, params)
    return Segmenter(stego.codes, head, centroids, linear, stego.ALPHA)


class _Best:
    """The params with the largest score of a training, in a file.

    A start after a kill computes what was lost again, with the same scores, so the file
    may be ahead of the training, but never holds what the training would not.
    """

    def __init__(self, path: Path, like: stego.Params):
        self._path, self._like = path, like
        kept = read_arrays(path)
        self._score = -math.inf if kept is None else float(kept["score"])

    def keep(self, params: stego.Params, step: int, score: float) -> None:
        if score <= self._score:
            return
        self._score = score
        told = serialization.to_bytes(jax.tree.map(np.asarray, params))
        arrays = {
            "params": np.frombuffer(told, np.uint8),
            "step": np.array(step),
            "score": np.array(score),
        }
        write_arrays(self._path, arrays)

    def read(self) -> tuple[stego.Params, int] | None:
        """Params and their step; None if the file is missing or damaged."""
        kept = read_arrays(self._path)
        if kept is None:
            return None
        params = serialization.from_bytes(self._like, kept["params"].tobytes())
        return params, int(kept["step"])


# --- Evaluation -----------------------------------------------------------------------


def run(job: Job) -> Result:
    """Trains a head from every seed; evaluates its best state and its last."""
    whole: Data = job.data
    (backbone,) = (
        name
        for model, name in zip(whole.models, whole.rows, strict=True)
        if model is job.model
    )
    job = job._replace(config=whole.shared.config, data=whole.shared)
    config, given = job.config, material(job)
    of_seeds: list[Counts] = []
    steps: list[int] = []
    shown: Sequence[np.ndarray] = ()
    for seed in range(config.seed, config.seed + config.seeds):
        heads = train(job, given, backbone, seed)
        name, best = f"{backbone}_seed{seed}", _segmenter(heads.best)
        counts = unsupervised.counts(job, name, best, given.views, given.labels)
        last = counts
        if heads.best_step != config.iterations:
            last = unsupervised.counts(
                job, f"{name}_last", _segmenter(heads.last), given.views, given.labels
            )
        counts = {**counts, **{f"{key}_last": x for key, x in last.items()}}
        if config.baselines:
            counts |= clusterings.counts(
                job, seed, given.train, given.views[0], given.labels
            )
        if config.pictures and not shown:
            rows = range(min(config.pictures, len(given.labels)))
            shown = unsupervised.predictions(job, best, given.views, rows)
        of_seeds.append(counts)
        steps.append(heads.best_step)
    return unsupervised.result(job, of_seeds, _evaluated(job, backbone, steps), shown)


def _evaluated(job: Job, backbone: str, steps: Sequence[int]) -> dict[str, Any]:
    """What the method has to tell, for the reader."""
    config = job.config
    row = options(config, backbone).row
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
