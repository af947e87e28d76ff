"""DINOv2's linear depth estimation on NYU Depth v2: the protocol `depth`.

    nyu_train.txt --random crops, raw tokens--> features --38,400 steps--> Head
    nyu_test.txt --image and mirrored image--> depth, averaged --> errors per image

Source: dinov2/eval/depth and its configs. The SINDER paper has no settings of its own.
The loss is computed in groups of two images, as on the eight GPUs of the original.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.evaluation import images, training
from experiments.evaluation.job import Job, Result, Scores
from sinder_jax import cli, families, placement
from sinder_jax.data import augment, decode, nyu, reading
from sinder_jax.data.nyu import Splits, View
from sinder_jax.evals import depth, features, segmentation
from sinder_jax.evals.depth import METRICS, Head
from sinder_jax.model import Model

# Pixels of a test image that count ("eigen" crop of NYU).
EVALUATED = (slice(45, 471), slice(41, 601))


class Data(NamedTuple):
    """Both lists and the options of the head."""

    splits: Splits
    options: depth.Options


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Lists the photographs; errors as `nyu.open_nyu`.

    Raises:
      ValueError: a number out of range; names the key.
    """
    images.check_common(config)
    for key in ("iterations", "images_per_step", "seeds", "save_every"):
        if config[key] < 1:
            raise ValueError(f"config.{key}: got {config[key]}, expected at least 1")
    if config.evaluate_every < 0:
        raise ValueError(
            f"config.evaluate_every: got {config.evaluate_every}, expected at least 0"
        )
    if not 0 < config.lr < float("inf"):
        raise ValueError(f"config.lr: got {config.lr}, expected a number above 0")
    try:
        options = depth.Options(
            total_steps=config.iterations,
            min_depth=config.min_depth,
            max_depth=config.max_depth,
            learning_rate=config.lr,
            loss_warm_up=config.loss_warm_up,
        )
        for model in models:
            depth.blocks(model.config.depth, config.layers)
    except ValueError as error:
        raise ValueError(f"config: {error}") from None
    if config.images_per_step % options.group:
        raise ValueError(
            f"config.images_per_step: got {config.images_per_step}, expected a "
            f"multiple of the {options.group} images that share a loss"
        )
    splits = nyu.open_nyu(config.data)
    if splits.lacks:
        cli.warn(f"{config.data} is not the usual set: {splits.lacks}")
    _check_known(config, splits.test)
    return Data(splits, options)


def _check_known(config: ConfigDict, views: Sequence[View]) -> None:
    """Reads test views up to the first one that has a pixel to evaluate."""
    for view in views:
        truth = view.read()[1][EVALUATED]
        if ((truth > config.min_depth) & (truth < config.max_depth)).any():
            return
    raise ValueError(
        f"no depth image of {config.data}/{nyu.LISTS[1]} has a pixel between "
        f"config.min_depth and config.max_depth, {config.min_depth} and "
        f"{config.max_depth} m, where it is evaluated: rows {EVALUATED[0].start} to "
        f"{EVALUATED[0].stop}, columns {EVALUATED[1].start} to {EVALUATED[1].stop}"
    )


# --- Evaluation -----------------------------------------------------------------------


def run(job: Job) -> Result:
    """Trains a head for each seed and reports its errors after the last step."""
    config, splits = job.config, job.data.splits
    seeds = range(config.seed, config.seed + config.seeds)
    trained = [_of_seed(job, seed) for seed in seeds]
    counts = np.stack([_counts(each.arrays["scores"]) for each in trained])
    told = {
        "images": len(splits.test),
        "training images": len(splits.train),
        "size": "640 x 480 px, mirrored too",
        "layers": config.layers,
        "iterations": config.iterations,
        "learning rate": config.lr,
        "seeds": config.seeds,
        "rmse where abs_rel was least": best(trained[0].history),
    }
    if unknown := int((counts[0, :, -1] == 0).sum()):
        told["images without a known depth"] = unknown
    return Result(
        counts=counts,
        score=score,
        headline=("rmse",),
        unit="m",
        evaluated=told,
        lower_is_better=True,
    )


def best(history: Mapping[int, Mapping[str, float | None]]) -> str:
    """RMSE at the evaluation with the least abs_rel, which the original also saves.

    Whether the published numbers are these or those of the last step is not known.
    """
    known = [
        (error, step)
        for step, summary in history.items()
        if (error := summary["abs_rel"]) is not None
    ]
    if not known:
        return "unknown"
    _, step = min(known)
    return f"{history[step]['rmse']:.3f} m after {step} iterations"


def _counts(scores: np.ndarray) -> np.ndarray:
    """Errors of each image, and 1; zeros for an image without a known pixel."""
    known = np.isfinite(scores).all(axis=1, keepdims=True)
    return np.where(known, np.concatenate([scores, known], axis=1), 0)


def score(total: np.ndarray, num_images: int) -> Scores:
    """The mean of each error over the images that have it."""
    return {
        name: float(x / total[-1]) if total[-1] else float("nan")
        for name, x in zip(METRICS, total[:-1], strict=True)
    }


# --- Training -------------------------------------------------------------------------


def _of_seed(job: Job, seed: int) -> training.Trained:
    config, splits, options = job.config, job.data.splits, job.data.options
    extract = images.extractor(
        job,
        blocks=depth.blocks(job.model.config.depth, config.layers),
        norm=False,
        of=_head_input,
        batch_axis=0,
    )
    channels = 2 * config.layers * job.model.config.embed_dim
    plan = training.Plan(
        folder=job.folder / f"seed_{seed}",
        key={
            "model": job.features_key,
            "photographs": images.digest_of(splits.train),
            "test photographs": images.digest_of(splits.test),
            "options": dataclasses.asdict(options),
            "layers": config.layers,
            "images per step": config.images_per_step,
            "seed": seed,
            "precision": config.matmul_precision,
        },
        total=config.iterations,
        save_every=config.save_every,
        evaluate_every=config.evaluate_every,
        label=f"head of seed {seed}",
    )
    return training.train(
        plan,
        jax.device_put(depth.init(jax.random.key(seed), channels), placement.first()),
        _step(options),
        functools.partial(_batches, job, extract, seed),
        functools.partial(evaluate, job, extract),
        progress=job.progress,
        stopping=job.stopping,
    )


def _head_input(found: features.BlockFeatures) -> jax.Array:
    return depth.head_input(found.cls, found.patches)


def _step(options: depth.Options) -> Callable[[Head, Any], tuple[Head, jax.Array]]:
    step, device = depth.make_step(options), placement.first()

    def take(state: Head, batch: tuple[jax.Array, np.ndarray]) -> Any:
        # On one device, as for the linear probe.
        found, truth = jax.device_put(batch, device)
        return step(state, found, truth)

    return take


def _batches(
    job: Job, extract: Callable[[Any], Any], seed: int, start: int
) -> Generator[Any, None, None]:
    """Features and depths of the training crops, from step `start` on."""
    config, size = job.config, job.config.images_per_step

    def collate(examples: Sequence[augment.DepthExample]) -> Any:
        pixels = _padded(job.model, [example.pixels for example in examples])
        return pixels, np.stack([example.depth for example in examples])

    found = reading.read_ahead(
        _ReadCrop(job.data.splits.train, seed),
        collate,
        size,
        start=start * size,
        num_threads=config.read_threads,
        num_workers=config.read_workers,
    )
    with closing(found):
        for pixels, truth in found:
            yield extract(pixels), truth


@dataclasses.dataclass(frozen=True)
class _ReadCrop:
    """Reads the example at a position of the training order; workers get a copy."""

    views: Sequence[View]
    seed: int

    def __call__(self, position: int) -> augment.DepthExample:
        index = augment.shuffled(position, len(self.views), self.seed)
        draws = augment.Draws(self.seed, position)
        return augment.depth_example(*self.views[index].read(), draws)


def _padded(model: Model, pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Normalized images, with zeros around them that make whole patches."""
    statistics = families.of(model.config).statistics
    stacked = np.stack([decode.normalize(each, statistics) for each in pixels])
    sides = [
        segmentation.center_padding(side, model.config.patch_size)
        for side in stacked.shape[1:3]
    ]
    return np.pad(stacked, [(0, 0), *sides, (0, 0)])


# --- Test -----------------------------------------------------------------------------


def evaluate(
    job: Job, extract: Callable[[Any], Any], state: Head
) -> training.Evaluation:
    """Errors of every test image, float64 [n, 9] in the order of `METRICS`.

    Raises:
      FloatingPointError: the training diverged.
    """
    config, views = job.config, job.data.splits.test
    found = reading.read_ahead(
        _ReadWhole(views),
        list,
        config.batch_size,
        stop=len(views),
        num_threads=config.read_threads,
        num_workers=config.read_workers,
    )
    errors: list[list[float]] = []
    job.progress.begin("depth of test images", len(views))
    with closing(found):
        for examples in found:
            pixels = [np.asarray(image) for image, _ in examples]
            predicted = predict(job, extract, state, pixels)
            if not np.isfinite(predicted).all():
                raise FloatingPointError(
                    f"training diverged after {int(state.step)} iterations: the head "
                    "predicts depths that are not finite; give a smaller --config.lr "
                    f"than {config.lr:g}, and another --workdir"
                )
            for one, (_, truth) in zip(predicted, examples, strict=True):
                errors.append(_errors(one, truth, job.data.options))
            job.progress.at(len(errors))
    job.progress.end()
    scores = np.array(errors)
    return training.Evaluation(
        score(_counts(scores).sum(axis=0), len(scores)), {"scores": scores}
    )


def predict(
    job: Job, extract: Callable[[Any], Any], state: Head, pixels: Sequence[np.ndarray]
) -> np.ndarray:
    """Meters [B, height, width]: the mean over the images and the mirrored images."""
    options, size = job.data.options, pixels[0].shape[:2]
    both = [*pixels, *(each[:, ::-1] for each in pixels)]
    found = jax.device_put(extract(_padded(job.model, both)), placement.first())
    meters = depth.predict(
        state, found, size, min_depth=options.min_depth, max_depth=options.max_depth
    )
    plain, mirrored = np.split(np.asarray(meters), 2)
    return (plain + mirrored[:, :, ::-1]) / 2


def _errors(
    predicted: np.ndarray, truth: np.ndarray, options: depth.Options
) -> list[float]:
    found = depth.scores(
        predicted[EVALUATED], truth[EVALUATED], options.min_depth, options.max_depth
    )
    return [found[name] for name in METRICS]


@dataclasses.dataclass(frozen=True)
class _ReadWhole:
    """Reads the i-th view; workers get a copy."""

    views: Sequence[View]

    def __call__(self, i: int) -> tuple[Any, np.ndarray]:
        return self.views[i].read()
