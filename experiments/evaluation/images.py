"""Features of a list of photographs, in the preprocessing of a protocol.

photographs --read, crop, normalize--> images --make_extract--> features, in order
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from experiments.evaluation.job import Job
from sinder_jax import families
from sinder_jax.data import decode, reading
from sinder_jax.data.listing import Photograph
from sinder_jax.evals import features
from sinder_jax.model import Model


def check_options(config: ConfigDict, models: Sequence[Model]) -> None:
    """Refuses settings of the features that no pass could run with.

    Raises:
      ValueError: a number out of range, an image that is not whole patches of each
        model.
    """
    for name, least in (
        ("batch_size", 1),
        ("read_threads", 0),
        ("read_workers", 0),
        ("resamples", 0),
    ):
        if config[name] < least:
            raise ValueError(
                f"config.{name}: got {config[name]}, expected at least {least}"
            )
    for model in models:
        size = model.config.patch_size
        decode.check_side("config.image_size", config.image_size, size)


@dataclasses.dataclass(frozen=True)
class Read:
    """Reads the i-th photograph as RGB pixels of one size; workers get a copy.

    Attributes:
      photographs: the list.
      crop: makes them all of one size.
    """

    photographs: Sequence[Photograph]
    crop: Callable[[Image.Image], Image.Image]

    def __call__(self, i: int) -> np.ndarray:
        """Raises UnreadableImage: an evaluation leaves no image out."""
        return np.asarray(self.crop(self.photographs[i].read()))


def passes(
    job: Job,
    photographs: Sequence[Photograph],
    crop: Callable[[Image.Image], Image.Image],
    label: str,
    **options: Any,
) -> Iterator[Any]:
    """Yields what `features.make_extract` returns for each batch, in order.

    Args:
      job: its config says how many images a device takes at once.
      photographs: the list.
      crop: makes the images of one size.
      label: names the step for the progress bar.
      **options: of `make_extract`: blocks, norm, of, batch_axis.

    Raises:
      UnreadableImage: a photograph cannot be decoded.
    """
    import jax

    config, model = job.config, job.model
    statistics = families.of(model.config).statistics
    extract = features.make_extract(
        model.config,
        model.params,
        group=config.batch_size,
        precision=config.matmul_precision,
        **options,
    )

    def collate(pixels: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([decode.normalize(each, statistics) for each in pixels])

    images = reading.read_ahead(
        Read(photographs, crop),
        collate,
        config.batch_size * len(jax.devices()),
        stop=len(photographs),
        num_threads=config.read_threads,
        num_workers=config.read_workers,
    )
    done = 0
    job.progress.begin(label, len(photographs))
    for some in images:
        yield extract(some)
        done += len(some)
        job.progress.at(done)
    job.progress.end()
