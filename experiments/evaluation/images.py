"""Features of a list of photographs, in the preprocessing of a protocol.

photographs --read, crop, normalize--> images --make_extract--> features, in order
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.evaluation.job import Job
from experiments.run import first_start
from sinder_jax import cli, families
from sinder_jax.data import decode, reading
from sinder_jax.data.listing import Photograph
from sinder_jax.data.scenes import AnyScene
from sinder_jax.evals import features
from sinder_jax.model import Model
from sinder_jax.state import PRECISIONS
from sinder_jax.storage import feature_store, paths

LEAST_CHUNK = 64  # images whose features are written at a time, in whole groups
MOST_SEED = 2**32 - 1  # JAX drops higher bits: 2**32 would give the numbers of 0
# Protocols that find features again.
KEEPING = (
    *("knn", "linear", "stego_cityscapes", "stego_potsdam3"),
    *("cause_cityscapes", "cause_voc", "artifacts"),
)


def check_common(config: ConfigDict) -> None:
    """Refuses settings of every protocol that no pass could run with.

    Warns of settings of the features on the disk where a protocol keeps none.

    Raises:
      ValueError: a number out of range; names the key.
    """
    for name, least in (
        ("batch_size", 1),
        ("read_threads", 0),
        ("read_workers", 0),
        ("resamples", 0),
        ("seed", 0),
    ):
        if config[name] < least:
            raise ValueError(
                f"config.{name}: got {config[name]}, expected at least {least}"
            )
    if config.seed > MOST_SEED:
        raise ValueError(
            f"config.seed: got {config.seed}, expected at most {MOST_SEED}"
        )
    for name, allowed in (
        ("matmul_precision", PRECISIONS),
        ("cache_dtype", feature_store.FORMATS),
    ):
        if config[name] not in allowed:
            raise ValueError(
                f"config.{name}: got {config[name]!r}, expected one of "
                f"{', '.join(allowed)}"
            )
    if paths.is_remote(config.cache):
        raise ValueError(
            f"config.cache: got {config.cache}, expected a folder of a disk: features "
            "are mapped into memory"
        )
    given = [
        f"config.{name}={config[name]}"
        for name, default in (("cache", ""), ("cache_dtype", feature_store.FORMATS[0]))
        if config[name] != default
    ]
    if given and config.protocol not in KEEPING:
        cli.warn(
            f"{' and '.join(given)} without effect: {config.protocol} computes the "
            "features of each image when it needs them, and keeps none"
        )


def check_options(config: ConfigDict, models: Sequence[Model]) -> None:
    """As `check_common`, for crops: `config.resize`, then `config.image_size`.

    Raises:
      ValueError: the crop is not whole patches of each model, or exceeds the resized
        image; that is too large for any memory.
    """
    check_common(config)
    for model in models:
        size = model.config.patch_size
        decode.check_side("config.image_size", config.image_size, size)
    if not config.image_size <= config.resize <= decode.LARGEST_SIDE:
        raise ValueError(
            f"config.resize: got {config.resize}, expected config.image_size, "
            f"{config.image_size}, to {decode.LARGEST_SIDE} pixels"
        )


@dataclasses.dataclass(frozen=True)
class Read:
    """Reads the i-th photograph as RGB pixels of one size; workers get a copy.

    Attributes:
      photographs: the list, or scenes: photographs with masks.
      crop: makes what each of them reads RGB pixels, all of one size.
    """

    photographs: Sequence[Photograph] | Sequence[AnyScene]
    crop: Callable[[Any], Any]

    def __call__(self, i: int) -> np.ndarray:
        """Raises UnreadableImage: an evaluation leaves no image out."""
        return np.asarray(self.crop(self.photographs[i].read()))


def resampling(model: Model) -> str:
    """How a model resamples its position embedding for other image sizes."""
    config = model.config
    antialias = "with" if config.interpolate_antialias else "without"
    return f"{antialias} antialias and offset {config.interpolate_offset:g}"


def differently_resampled(first: Model, other: Model) -> str:
    """How two models differ in this, and what to do; empty if they do not.

    Models with and without registers do as published, and are not compared.
    """
    registers = {model.config.num_register_tokens for model in (first, other)}
    if len(registers) > 1 or resampling(first) == resampling(other):
        return ""
    return (
        f"{first.path} resamples its position embedding {resampling(first)}, "
        f"{other.path} {resampling(other)} (`python -m convert to-jax SRC DST "
        "--interpolate-antialias=true|false --interpolate-offset=N` writes PyTorch "
        "weights with that of the other)"
    )


def extractor(job: Job, **options: Any) -> Callable[[Any], Any]:
    """`features.make_extract` of the job's model and forward pass, as its config says.

    Args:
      job: of an evaluation.
      **options: blocks, norm, of, batch_axis.
    """
    return features.make_extract(
        job.model.config,
        job.model.params,
        group=job.config.batch_size,
        precision=job.config.matmul_precision,
        run=job.forward.run,
        **options,
    )


def passes(
    job: Job,
    extract: Callable[[Any], Any],
    photographs: Sequence[Photograph] | Sequence[AnyScene],
    crop: Callable[[Any], Any],
    rows: range,
) -> Generator[Any, None, None]:
    """Yields what `extract` returns for each batch of photographs, in order.

    The next batch is dispatched before a batch is used, so devices do not wait.

    Args:
      job: its config says how many images a device takes at once.
      extract: from `extractor`.
      photographs: the list.
      crop: as `Read`'s.
      rows: which of the photographs to read.

    Raises:
      UnreadableImage: a photograph cannot be decoded.
    """
    config, statistics = job.config, families.of(job.model.config).statistics

    def collate(pixels: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([decode.normalize(each, statistics) for each in pixels])

    images = reading.read_ahead(
        Read(photographs, crop),
        collate,
        config.batch_size * len(jax.devices()),
        start=rows.start,
        stop=rows.stop,
        num_threads=config.read_threads,
        num_workers=config.read_workers,
    )
    with closing(images):
        pending = None
        for some in images:
            newer = extract(some)
            if pending is not None:
                yield pending
            pending = newer
        if pending is not None:
            yield pending


def cached(
    job: Job,
    name: str,
    photographs: Sequence[Photograph] | Sequence[AnyScene],
    crop: Callable[[Any], Any],
    shape: tuple[int, ...],
    key: Mapping[str, Any],
    **options: Any,
) -> np.ndarray:
    """Features of all photographs, as a memory map; computes those not kept yet.

    Args:
      job: names the folder of the features and the number format.
      name: of the photographs, for messages, such as "val".
      photographs: the list.
      crop: as `Read`'s.
      shape: of an image's features.
      key: what decides the features beside model, photographs, precision and number
        format: the crop, the blocks, what is made of their tokens. JSON values.
      **options: of `make_extract`; what `of` returns is one array, split by
        `batch_axis` 0.

    Returns:
      [n, *shape], float32 or float16.

    Raises:
      ValueError: features that are not finite, or too large for float16; another
        process writes these features.
      OSError: the features cannot be kept.
      UnreadableImage: a photograph cannot be decoded.
    """
    config, progress = job.config, job.progress
    key = {
        "model": job.features_key,
        "photographs": digest_of(photographs),
        "precision": config.matmul_precision,
        "number format": config.cache_dtype,
        **key,
    }
    with feature_store.open_rows(
        feature_store.folder_of(job.cache, key),
        key,
        count=len(photographs),
        shape=shape,
        dtype=config.cache_dtype,
        chunk=max(LEAST_CHUNK // config.batch_size, 1) * config.batch_size,
    ) as store:
        if store.damaged:
            cli.warn(
                f"{store.folder}: {store.damaged} chunks of features are damaged, and "
                "computed again"
            )
        missing = store.missing()
        done = len(photographs) - sum(map(len, missing))
        if not missing:
            progress.say(f"features of {name}: {done}, all found in {store.folder}")
        else:
            progress.begin(f"features of {name}", len(photographs), done)
            extract = extractor(job, **options)
        for rows in missing:
            found = passes(job, extract, photographs, crop, rows)
            for start, chunk in _in_chunks(found, rows, store.chunk):
                _write(store, start, chunk, photographs)
                done += len(chunk)
                progress.at(done)
        progress.end()
        if config.cache_dtype != "float32":
            progress.say(
                f"features of {name}: as {config.cache_dtype} each is moved by at most "
                f"{store.rounding():.1e} of its length"
            )
        return store.array()


def _in_chunks(
    found: Iterable[Any], rows: range, size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks of one size of the features of `rows`, and the first row of each."""
    start, waiting = rows.start, []
    for some in found:
        waiting.append(np.asarray(some))
        while (there := sum(map(len, waiting))) >= min(size, rows.stop - start) > 0:
            joined = np.concatenate(waiting)
            end = min(size, rows.stop - start)
            yield start, joined[:end]
            start, waiting = start + end, [joined[end:]] if there > end else []


def _write(
    store: feature_store.Rows,
    start: int,
    chunk: np.ndarray,
    photographs: Sequence[Photograph] | Sequence[AnyScene],
) -> None:
    bad = np.flatnonzero(~np.isfinite(chunk.reshape(len(chunk), -1)).all(axis=1))
    if bad.size:
        name = photographs[start + bad[0]].name
        raise FloatingPointError(f"the model's features of {name} are not finite")
    store.write(start, chunk)


def digest_of(photographs: Sequence[Photograph] | Sequence[AnyScene]) -> str:
    """Digest of the names, sizes and times of photographs, in their order."""
    listed = json.dumps(first_start.stamps(photographs))
    return hashlib.sha256(listed.encode()).hexdigest()
