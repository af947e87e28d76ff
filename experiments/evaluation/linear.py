"""DINOv2's linear probe: the protocol `linear`.

    train --random crops, tokens of the last four blocks--> 4 kinds of features
    features --13 learning rates each, trained at once--> 52 heads
    val --center crop, tokens, kept--> top-1 and top-5 of every head; the best counts

Source: dinov2/eval/linear.py, SINDER's appendix G.4. The tokens are float32, where the
original computes them in float16; a pass over the training images is one permutation,
where the original's ranks each permute a share of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.evaluation import images, training
from experiments.evaluation.job import Job, Result, Scores
from sinder_jax import families, placement
from sinder_jax.data import augment, decode, labelled, listing, reading
from sinder_jax.data.labelled import Splits
from sinder_jax.data.listing import Photograph
from sinder_jax.evals import features, linear
from sinder_jax.evals.linear import KINDS, Heads, Kind
from sinder_jax.model import Model

# What 0 of a key of the config stands for: as published; and on sample:crops instead.
PUBLISHED = {
    "resize": 256,
    "image_size": 224,
    "iterations": 12_500,
    "images_per_step": 1_024,
    "evaluate_every": 1_250,
}
SHORT = {
    "resize": 128,
    "image_size": 112,
    "iterations": 30,
    "images_per_step": 32,
    "evaluate_every": 30,
}
BLOCKS = 4
SHARES = 8
TOP = (1, 5)
AT_ONCE = 4_096  # validation images whose logits are in memory at a time

State = dict[str, Heads]


class Data(NamedTuple):
    """Both splits, and the config with every number filled in."""

    splits: Splits
    config: ConfigDict
    learning_rates: list[float]  # for a batch of 256


def name_of(kind: Kind) -> str:
    """Such as "4_cls_mean": class tokens of four blocks, and the mean patch token."""
    return f"{kind[0]}_cls{'_mean' if kind[1] else ''}"


# --- Preparation ----------------------------------------------------------------------


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Fills in the config and lists the photographs; errors as `labelled.open_classes`.

    Raises:
      ValueError: a number out of range; names the key.
    """
    filled = config.copy_and_resolve_references().unlock()
    open_keys = SHORT if config.data == listing.CROPS else PUBLISHED
    for key, value in open_keys.items():
        filled[key] = config[key] or value
    if config.iterations and not config.evaluate_every:
        # The published share of the iterations; not beyond the last one.
        filled.evaluate_every = max(filled.iterations // 10, 1)
    for key in (*open_keys, "seeds", "save_every"):
        if filled[key] < 1:
            raise ValueError(f"config.{key}: got {filled[key]}, expected at least 1")
    # Up to `SHARES` devices share a step without computing anything for nothing.
    filled.batch_size = min(filled.batch_size, max(filled.images_per_step // SHARES, 1))
    filled.lock()
    images.check_options(filled, models)
    for model in models:
        features.last_blocks(model.config, BLOCKS)
    rates = _learning_rates(filled)
    splits = labelled.open_classes(config.data)
    return Data(splits, filled, rates)


def _learning_rates(config: ConfigDict) -> list[float]:
    try:
        rates = [float(rate) for rate in config.learning_rates.split(",")]
    except ValueError:
        rates = []
    scaled = linear.scaled(rates, config.images_per_step)
    least, most = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    if not rates or not all(least <= rate <= most for rate in scaled):
        raise ValueError(
            f"config.learning_rates: got {config.learning_rates!r}, expected numbers "
            "above 0, within float32, separated by commas"
        )
    return sorted(set(rates))


# --- Evaluation -----------------------------------------------------------------------


def run(job: Job) -> Result:
    """Trains all heads, once for each seed, and reports the best ones."""
    config = job.data.config
    job = job._replace(config=config)
    val = val_tokens(job)
    seeds = range(config.seed, config.seed + config.seeds)
    found = [_of_seed(job, val, seed) for seed in seeds]
    counts, best = zip(*(_counts(job.data, arrays) for arrays in found), strict=True)
    return Result(
        counts=np.stack(counts).astype(np.float64),
        score=score,
        headline=("top1", "top5", *(f"top1_{name_of(kind)}" for kind in KINDS)),
        unit="%",
        evaluated=_evaluated(job, ", ".join(dict.fromkeys(best))),
    )


def _evaluated(job: Job, best: str) -> dict[str, Any]:
    config, (train, val) = job.config, job.data.splits
    told = {
        "images": len(val.labels),
        "training images": len(train.labels),
        "classes": len(train.names),
        "size": f"{config.image_size} px",
        "iterations": config.iterations,
        "images per iteration": config.images_per_step,
        "seeds": config.seeds,
        "best head": best,
    }
    if absent := val.absent():
        told["classes without images"] = absent
    return told


def val_tokens(job: Job) -> np.ndarray:
    """Class tokens of the last four blocks and the mean patch token, [n, 5, D]."""
    config, model = job.config, job.model
    size = {"resize": config.resize, "size": config.image_size}
    return images.cached(
        job,
        "val",
        job.data.splits.val.photographs,
        functools.partial(decode.evaluation_crop, **size),
        (BLOCKS + 1, model.config.embed_dim),
        {"features": "class tokens of 4 blocks, mean patch token", **size},
        **_extracted(model),
    )


def _extracted(model: Model) -> dict[str, Any]:
    return {
        "blocks": features.last_blocks(model.config, BLOCKS),
        "of": _tokens,
        "batch_axis": 0,
    }


def _tokens(found: features.BlockFeatures) -> jax.Array:
    """All that the heads read of an image, [B, 5, D]."""
    mean = jnp.mean(found.patches[-1], axis=(1, 2))
    return jnp.stack([*found.cls, mean], axis=1)


@jax.jit
def _features(tokens: jax.Array) -> dict[Kind, jax.Array]:
    by_block = jnp.moveaxis(tokens, 1, 0)
    return linear.features(by_block[:BLOCKS], by_block[BLOCKS:, :, None, None, :])


# --- Training -------------------------------------------------------------------------


def _of_seed(job: Job, val: np.ndarray, seed: int) -> Mapping[str, np.ndarray]:
    """Trains the heads of a seed; returns "top1" and "top5", uint8 [52, n]."""
    config, train = job.config, job.data.splits.train
    rates = linear.scaled(job.data.learning_rates, config.images_per_step)
    key = jax.random.key(seed)
    state: State = {
        name_of(kind): linear.init(
            jax.random.fold_in(key, number),
            job.model.config.embed_dim * (kind[0] + kind[1]),
            len(train.names),
            rates,
        )
        for number, kind in enumerate(KINDS)
    }
    plan = training.Plan(
        folder=job.folder / f"seed_{seed}",
        key={
            "model": job.features_key,
            "photographs": images.digest_of(train.photographs),
            "validation photographs": images.digest_of(job.data.splits.val.photographs),
            "settings": {
                name: config[name] for name in (*PUBLISHED, "batch_size", "seed")
            },
            "precision": config.matmul_precision,
            "learning rates": rates,
        },
        total=config.iterations,
        save_every=config.save_every,
        evaluate_every=config.evaluate_every,
        label=f"heads of seed {seed}",
    )
    labels = job.data.splits.val.labels
    trained = training.train(
        plan,
        jax.device_put(state, placement.first()),
        _step(config.iterations),
        functools.partial(_batches, job, seed),
        lambda state: evaluate(state, val, labels),
        progress=job.progress,
        stopping=job.stopping,
    )
    return trained.arrays


def _step(total: int) -> Callable[[State, Any], tuple[State, jax.Array]]:
    step, device = linear.make_step(total, donate=True), placement.first()

    def take(state: State, batch: tuple[jax.Array, np.ndarray]) -> Any:
        tokens, labels = batch
        # The heads are on one device: their step takes a few percent of the time of the
        # features, which the others compute meanwhile. XLA does not compile the same
        # program for one device and for several, which would change the last bits.
        found = _features(jax.device_put(tokens, device))
        moved, losses = {}, []
        for kind, x in found.items():
            name = name_of(kind)
            moved[name], loss = step(state[name], x, labels)
            losses.append(loss)
        return moved, jnp.concatenate(losses)

    return take


def _batches(job: Job, seed: int, start: int) -> Generator[Any, None, None]:
    """Tokens and labels of the training images, from step `start` on."""
    config, statistics = job.config, families.of(job.model.config).statistics
    train, size = job.data.splits.train, config.images_per_step
    extract = images.extractor(job, **_extracted(job.model))

    def collate(examples: Sequence[tuple[np.ndarray, int]]) -> Any:
        pixels = [decode.normalize(image, statistics) for image, _ in examples]
        return np.stack(pixels), np.array([label for _, label in examples], np.int32)

    read = _Read(train.photographs, train.labels, config.image_size, seed)
    found = reading.read_ahead(
        read,
        collate,
        size,
        start=start * size,
        num_threads=config.read_threads,
        num_workers=config.read_workers,
    )
    try:
        for pixels, labels in found:
            yield extract(pixels), labels
    finally:
        found.close()


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads the example at a position of the training order; workers get a copy."""

    photographs: Sequence[Photograph]
    labels: np.ndarray
    size: int
    seed: int

    def __call__(self, position: int) -> tuple[np.ndarray, int]:
        index = augment.shuffled(position, len(self.photographs), self.seed)
        draws = augment.Draws(self.seed, position)
        image = augment.crop_and_flip(self.photographs[index].read(), self.size, draws)
        return np.asarray(image), int(self.labels[index])


# --- Results --------------------------------------------------------------------------


def evaluate(state: State, val: np.ndarray, labels: np.ndarray) -> training.Evaluation:
    """Which validation images each head classifies correctly."""
    right: dict[int, list[np.ndarray]] = {top: [] for top in TOP}
    device = placement.first()
    for start in range(0, len(labels), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        tokens = jax.device_put(val[some].astype(np.float32), device)
        found = _features(tokens)
        ranks = np.concatenate(
            [
                np.asarray(linear.ranks(state[name_of(kind)], x, labels[some]))
                for kind, x in found.items()
            ]
        )
        for top in TOP:
            right[top].append(ranks < top)
    arrays = {
        f"top{top}": np.concatenate(each, axis=1).astype(np.uint8)
        for top, each in right.items()
    }
    best = float(arrays["top1"].mean(axis=1).max())
    return training.Evaluation({"top1": 100 * best}, arrays)


def _counts(data: Data, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """What each image adds, [n, 5, 2]: of the best head, and of each kind's best.

    Also the name of the best head. The best is chosen on the images that are reported,
    as in the original.
    """
    heads = len(data.learning_rates)
    right = np.stack([arrays[f"top{top}"] for top in TOP], axis=-1)  # [52, n, 2]
    by_kind = dict(
        zip(KINDS, right.reshape(len(KINDS), heads, *right.shape[1:]), strict=True)
    )
    accuracy = {kind: each[..., 0].mean(axis=1) for kind, each in by_kind.items()}
    kind, number = linear.best(accuracy)
    chosen = [by_kind[kind][number]]
    chosen += [each[np.argmax(accuracy[kind])] for kind, each in by_kind.items()]
    name = f"{name_of(kind)} at base learning rate {data.learning_rates[number]:g}"
    return np.stack(chosen, axis=1), name


def score(total: np.ndarray, num_images: int) -> Scores:
    """Percent of the images, [5, 2]: of the best head, then of each kind's best."""
    share = 100 * total / num_images
    names = ["", *(f"_{name_of(kind)}" for kind in KINDS)]
    return {
        f"top{top}{name}": float(share[i, j])
        for i, name in enumerate(names)
        for j, top in enumerate(TOP)
    }
