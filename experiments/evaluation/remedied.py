"""Remedies as rows of any evaluation: what each makes of the first checkpoint.

    config.remedies --prepare--> Remedies: names, photographs that they may read
    Remedies, Job of a checkpoint --forms--> Forms: that Job, then one for each remedy
    Form --kept_cost--> seconds and photographs of the remedy, as first measured

The other checkpoints are compared with the first one, so nothing is done to them.
"""

import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.evaluation.job import AS_IT_IS, Forward, Job
from sinder_jax import families
from sinder_jax.data import decode, listing
from sinder_jax.data.listing import Photograph
from sinder_jax.model import Model
from sinder_jax.remedies import REMEDIES, register_neurons
from sinder_jax.storage import files, paths, run_files

NAMES = tuple(
    name
    for name in REMEDIES
    if name != "nothing" and REMEDIES[name].needs != "repaired"
)
# Keys of a config that change no row but those of remedies.
KEYS = ("remedies", "gamma", "remedy_images", "remedy_data")
SECONDS, READ = "seconds of the remedy", "photographs it read"
OWN_SECONDS, PASSED = "seconds of its repair", "images its repair passed"
# What a table tells of a cost, by the name of its column.
COSTS = {"seconds": (SECONDS, OWN_SECONDS), "photographs": (READ, PASSED)}
UNLABELED = ("artifacts",)  # protocols whose `config.data` a remedy may read


class Remedies(NamedTuple):
    """What is done to the first checkpoint.

    Attributes:
      names: of the remedies, keys of `REMEDIES`.
      photographs: that they may read; empty if none of them does.
    """

    names: tuple[str, ...]
    photographs: Sequence[Photograph]


NONE = Remedies((), [])


class Form(NamedTuple):
    """One form of a checkpoint: as it is, or after a remedy.

    Attributes:
      name: of its row.
      job: evaluates this form; its folder is still to be set.
      cost: of the remedy, or of the repair that made the checkpoint; JSON values by
        name, for the reader.
      remedy: its name; empty for the checkpoint as it is.
    """

    name: str
    job: Job
    cost: dict[str, Any]
    remedy: str = ""

    @property
    def details(self) -> dict[str, Any]:
        """More for results.json."""
        return {"remedy": self.remedy} if self.remedy else {}


# --- Before anything is computed ------------------------------------------------------


def prepare(config: ConfigDict) -> Remedies:
    """Checks the remedies of the config, and lists the photographs that they read.

    Raises:
      ValueError: an unknown remedy, or one that lacks what it needs; says what to give.
      UnreadableImage: a photograph to read is damaged.
      FileNotFoundError, OSError: as `listing.open_photographs`.
    """
    names = tuple(name.strip() for name in config.remedies.split(",") if name.strip())
    for name in names:
        if name not in NAMES:
            hint = "; give a repaired model as --checkpoint" if name in REMEDIES else ""
            raise ValueError(
                f"config.remedies: got {name!r}, expected some of {', '.join(NAMES)}"
                f"{hint}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"config.remedies: got {config.remedies!r}, one of them twice")
    if config.remedies and not names:
        raise ValueError(
            f"config.remedies: got {config.remedies!r}, expected some of "
            f"{', '.join(NAMES)}"
        )
    clamps = any(REMEDIES[name].needs == "gamma" for name in names)
    if clamps and not config.gamma > 0:
        raise ValueError(
            f"config.gamma: got {config.gamma:g}, expected the largest singular value "
            "that clamping leaves, above 0; add --config.gamma="
        )
    if config.gamma and not clamps:
        raise ValueError(
            f"config.gamma: got {config.gamma:g}, which is of clamping, and "
            "config.remedies has none; leave it out or add clamping"
        )
    readers = [name for name in names if REMEDIES[name].needs == "photographs"]
    if readers and config.matmul_precision != "highest":
        raise ValueError(
            f"config.matmul_precision: got {config.matmul_precision!r}, expected "
            f"'highest': {' and '.join(readers)} know no other"
        )
    if config.remedy_data and not readers:
        raise ValueError(
            f"config.remedy_data: got {config.remedy_data!r}, and no remedy of "
            "config.remedies reads photographs; leave it out or add test-time registers"
        )
    return Remedies(names, _photographs(config, readers) if readers else [])


def _photographs(config: ConfigDict, readers: Sequence[str]) -> list[Photograph]:
    own = config.protocol in UNLABELED
    source, count = (
        config.remedy_data or (config.data if own else ""),
        config.remedy_images,
    )
    if not source:
        key = "data" if own else "remedy_data"
        raise ValueError(
            f"{' and '.join(readers)} read photographs, of whatever: add "
            f"--config.{key}=FOLDER, or --config.{key}=sample for those inside "
            "scikit-image"
        )
    found = listing.open_photographs(source)
    measured = own and source == config.data  # on one at least
    most = len(found) - measured
    if not 1 <= count <= most:
        raise ValueError(
            f"config.remedy_images: got {count}, expected 1 to {most}, as {source} has "
            f"{len(found)} photographs{' and some are measured' if measured else ''}"
        )
    chosen = spread(found, count)
    for photograph in chosen:
        photograph.read()  # a damaged one is named now
    return chosen


def spread(photographs: Sequence[Photograph], most: int) -> list[Photograph]:
    """The first photograph of each of `most` equal parts of a list.

    Decodes none: one that is damaged is named when it is read.
    """
    count = len(photographs)
    parts = np.array_split(np.arange(count), min(most, count) or 1)
    return [photographs[part[0]] for part in parts if part.size]


def but(
    photographs: Sequence[Photograph], read: Sequence[Photograph]
) -> list[Photograph]:
    """The photographs that were not read, and are no crops of such."""
    seen = set(map(_place, read))
    return [each for each in photographs if _place(each) not in seen]


def _place(photograph: Photograph) -> str:
    name = listing.whole(photograph).name
    return os.path.realpath(name) if os.path.exists(name) else name


# --- Each form of a checkpoint --------------------------------------------------------


def forms(remedies: Remedies, job: Job, checkpoint: str) -> Iterator[Form]:
    """The checkpoint as it is, then what each remedy makes of it, one at a time.

    Args:
      remedies: to apply.
      job: of the checkpoint's model.
      checkpoint: as it was given.
    """
    yield Form(checkpoint, job, cost_of_repair(checkpoint))
    for name in remedies.names:
        job.progress.say(f"remedy: {name}")
        made, cost = _after(remedies, job, name)
        yield Form(f"{checkpoint} + {name}", made, cost, name)


def _after(remedies: Remedies, job: Job, name: str) -> tuple[Job, dict[str, Any]]:
    """Applies a remedy to the job's model."""
    model, remedy = job.model, REMEDIES[name]
    _ = model.params  # reading them is no part of the remedy
    began = time.monotonic()
    reads = remedy.needs == "photographs"
    given: Any = job.config.gamma if remedy.needs == "gamma" else None
    if reads:
        given = [_pixels(model, each) for each in remedies.photographs]
    params, neurons = remedy.apply(model, given)
    cost: dict[str, Any] = {
        SECONDS: round(time.monotonic() - began, 2),
        READ: len(remedies.photographs) if reads else 0,
    }
    moved = list(zip(neurons.blocks.tolist(), neurons.units.tolist(), strict=True))
    if reads:
        units = ", ".join(f"{unit} of block {block}" for block, unit in moved)
        cost["units moved"] = units or "none"
    forward = AS_IT_IS
    if moved:
        run = functools.partial(_with_register, neurons)
        forward = Forward(run, ("test-time registers", moved))
    made = Model.of(model.config, params)
    if made.digest == model.digest:
        made = model
        cost |= {} if moved else {"weights changed": "none"}
    return job._replace(model=made, forward=forward, origin=model), cost


def _pixels(model: Model, photograph: Photograph) -> np.ndarray:
    """At the size of the model's position embedding."""
    size, patch_size = model.config.img_size, model.config.patch_size
    image = decode.training_crop(photograph.read(), size, patch_size=patch_size)
    return decode.normalize(image, families.of(model.config).statistics)


def _with_register(
    neurons: register_neurons.Neurons,
    config: Any,
    params: Any,
    pixels: Any,
    blocks: tuple[int, ...],
) -> Any:
    return register_neurons.intermediates(config, params, neurons, pixels, blocks)


# --- What it cost ---------------------------------------------------------------------


def kept_cost(form: Form, folder: Path) -> dict[str, Any]:
    """The cost of a form; the seconds of a remedy are those of the first time."""
    if not form.remedy:
        return form.cost
    kept = folder / f"{form.remedy.replace(' ', '_')}.json"
    cost = json.loads(kept.read_text()) if kept.exists() else {}
    if cost | {SECONDS: 0} != form.cost | {SECONDS: 0}:
        cost = form.cost
        files.write(kept, json.dumps(cost))
    return cost


def cost_of_repair(checkpoint: str) -> dict[str, Any]:
    """What the workdir of a repair says of a repaired checkpoint; empty if it has none.

    Args:
      checkpoint: the workdir, or a repaired model inside.
    """
    place = paths.located(checkpoint)
    if place.name.partition(".")[0] == run_files.REPAIRED:
        place = place.parent
    try:
        with paths.answering(place):
            told = run_files.read_json(place / run_files.SUMMARY)
    except (OSError, ValueError):
        return {}
    if "repair" in told:  # says that it was none by photographs
        told["images"] = 0
    names = {"seconds": OWN_SECONDS, "images": PASSED}
    return {name: told[key] for key, name in names.items() if key in told}
