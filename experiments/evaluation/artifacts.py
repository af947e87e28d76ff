"""How defective patch tokens are, and what a remedy damages: the protocol `artifacts`.

    photographs --each model's last block--> tokens, kept as features
    tokens, those of the first model, those of the truth --sums--> a row a photograph

The first checkpoint is what the others are compared with. Remedies of
`config.remedies` are applied to it, and each gives a row of its own. All rows are
measured on the same photographs; those that a remedy reads are others.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import convert
from experiments.evaluation import images
from experiments.evaluation.job import Job, Result, Scores
from experiments.run import results
from sinder_jax import families, loss, vit
from sinder_jax.analysis import artifacts, forecast
from sinder_jax.data import decode, listing
from sinder_jax.data.listing import Photograph
from sinder_jax.evals import features
from sinder_jax.model import Model, check_same_architecture
from sinder_jax.remedies import REMEDIES, Remedied, register_neurons
from sinder_jax.storage import files

NAMES = tuple(
    name
    for name in REMEDIES
    if name != "nothing" and REMEDIES[name].needs != "repaired"
)
PHOTOGRAPH = "photograph_variation"
COLUMNS = (*artifacts.Sums._fields, PHOTOGRAPH)


@dataclasses.dataclass(frozen=True)
class Data:
    """What all rows have in common.

    Attributes:
      first: the model before any remedy.
      truth: the model before planting, or None.
      photographs: to measure on.
      others: for remedies that read photographs.
      remedies: names of those to apply to `first`.
    """

    first: Model
    truth: Model | None
    photographs: list[Photograph]
    others: list[Photograph]
    remedies: tuple[str, ...]

    @functools.cached_property
    def direction(self) -> np.ndarray:
        """ν of the last block, as the first model's forecast says."""
        return forecast.forecast(self.first.config, self.first.params).directions[-1]


# --- Before anything is computed ------------------------------------------------------


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Lists the photographs and opens the truth; errors as `listing.open_photographs`.

    Raises:
      ValueError: a setting out of range; models of different architectures; too few
        photographs.
    """
    images.check_common(config)
    first, size = models[0], models[0].config.patch_size
    decode.check_side("config.image_size", config.image_size, size)
    if config.image_size < 3 * size:
        raise ValueError(
            f"config.image_size: got {config.image_size}, expected at least three "
            f"patches, {3 * size}"
        )
    if config.num_images < 1:
        raise ValueError(
            f"config.num_images: got {config.num_images}, expected at least 1"
        )
    loss.check_loss_options(mask_thr=config.mask_thr, window=3)
    remedies = remedies_of(config)
    truth = convert.open_model(config.truth) if config.truth else None
    for other in (*models[1:], *([truth] if truth else [])):
        check_same_architecture(first, other)
    photographs, others = chosen(config, remedies)
    return Data(first, truth, photographs, others, remedies)


def remedies_of(config: ConfigDict) -> tuple[str, ...]:
    """The names in `config.remedies`; empty if there are none.

    Raises:
      ValueError: an unknown remedy, or one that lacks what it needs.
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
    needs = {REMEDIES[name].needs for name in names}
    if "gamma" in needs and not config.gamma > 0:
        raise ValueError(
            f"config.gamma: got {config.gamma:g}, expected the largest singular value "
            "that clamping leaves, above 0"
        )
    if "photographs" in needs and config.remedy_images < 1:
        raise ValueError(
            f"config.remedy_images: got {config.remedy_images}, expected at least 1"
        )
    if "photographs" in needs and config.matmul_precision != "highest":
        raise ValueError(
            f"config.matmul_precision: got {config.matmul_precision!r}, expected "
            "'highest': test-time registers know no other"
        )
    return names


def chosen(
    config: ConfigDict, remedies: Sequence[str]
) -> tuple[list[Photograph], list[Photograph]]:
    """The photographs to measure on, and those that remedies read.

    Raises:
      ValueError: no data given, or too few photographs.
    """
    if not config.data:
        raise ValueError(
            "no photographs: add --config.data=FOLDER, or --config.data=sample:crops "
            "for those inside scikit-image"
        )
    found = listing.open_photographs(config.data)
    reads = any(REMEDIES[name].needs == "photographs" for name in remedies)
    count = config.remedy_images if reads else 0
    if len(found) < count + 1:
        raise ValueError(
            f"config.remedy_images: got {count}, and {config.data} has {len(found)} "
            "photographs: at least one more is needed to measure on"
        )
    others = results.spread(found, count) if count else []
    names = {photograph.name for photograph in others}
    rest = [photograph for photograph in found if photograph.name not in names]
    if not rest:
        raise ValueError(f"{config.data}: no photograph is left to measure on")
    return results.spread(rest, config.num_images), others


# --- One checkpoint -------------------------------------------------------------------


def run(job: Job) -> Mapping[str, Result]:
    """Measures a checkpoint; of the first one also what each remedy makes of it."""
    found = {"": _measured(job, Remedied(job.model.params), {})}
    if job.model is job.data.first:
        for name in job.data.remedies:
            remedied, told = _remedied(job, name)
            found[name] = _measured(job, remedied, {"remedy": name, **told})
    return found


def _remedied(job: Job, name: str) -> tuple[Remedied, dict[str, Any]]:
    """The remedy, the seconds that it took and how many photographs it read.

    The seconds are those of the first time: a run that goes on tells the same.
    """
    config, data, remedy = job.config, job.data, REMEDIES[name]
    kept = job.folder / f"{name.replace(' ', '_')}.json"
    job.progress.say(f"remedy: {name}")
    began = time.monotonic()
    given: Any = None
    if remedy.needs == "gamma":
        given = config.gamma
    elif remedy.needs == "photographs":
        read, statistics = _read(job), families.of(data.first.config).statistics
        given = [decode.normalize(read(x.read()), statistics) for x in data.others]
    remedied = remedy.apply(data.first, given)
    if not kept.exists():
        count = len(data.others) if remedy.needs == "photographs" else 0
        told = {
            "seconds of the remedy": round(time.monotonic() - began, 2),
            "photographs it read": count,
        }
        files.write(kept, json.dumps(told))
    return remedied, json.loads(kept.read_text())


def _measured(job: Job, remedied: Remedied, told: Mapping[str, Any]) -> Result:
    data, model = job.data, job.model
    if remedied.params is not model.params:
        model = Model.of(model.config, remedied.params)
    now = tokens(job, model, remedied.neurons)
    before = tokens(job, data.first)
    truth = None if data.truth is None else tokens(job, data.truth)
    read, rows = images.Read(data.photographs, _read(job)), []
    job.progress.begin("photographs measured", len(now))
    for i in range(len(now)):
        found = artifacts.sums(
            np.asarray(now[i], np.float32),
            np.asarray(before[i], np.float32),
            data.direction.astype(np.float32),
            None if truth is None else np.asarray(truth[i], np.float32),
            mask_thr=float(job.config.mask_thr),
        )
        own = artifacts.photograph_variation(read(i), model.config.patch_size)
        rows.append([*map(float, found), own])
        job.progress.at(i + 1)
    job.progress.end()
    counts = np.array(rows)[None]
    measure = functools.partial(score, data.truth is not None)
    size = job.config.image_size
    patches = (size // model.config.patch_size) ** 2
    return Result(
        counts=counts,
        score=measure,
        headline=tuple(measure(counts[0].sum(axis=0), len(rows))),
        unit="",
        evaluated={
            "images": len(rows),
            "image size": size,
            "k of the tail": artifacts.tail_size(patches),
            **told,
        },
        lower_is_better=None,
        details={"remedy": told["remedy"]} if told else {},
        versus=("damage", "mending"),
    )


def _read(job: Job) -> Callable[[Any], Any]:
    return functools.partial(
        decode.training_crop,
        size=job.config.image_size,
        patch_size=job.model.config.patch_size,
    )


def tokens(
    job: Job,
    model: Model,
    neurons: register_neurons.Neurons = register_neurons.NONE,
) -> np.ndarray:
    """Raw patch tokens of the last block, [n, H, W, D], as a memory map."""
    side = job.config.image_size // model.config.patch_size
    moved = list(zip(neurons.blocks.tolist(), neurons.units.tolist(), strict=True))
    options: dict[str, Any] = {}
    if moved:
        options["run"] = functools.partial(_with_register, neurons)
    return images.cached(
        job._replace(model=model),
        "photographs",
        job.data.photographs,
        _read(job),
        (side, side, model.config.embed_dim),
        {
            "features": "raw patch tokens",
            "size": job.config.image_size,
            "moved": [list(each) for each in moved],
        },
        blocks=features.last_blocks(model.config, 1),
        norm=False,
        of=_patches,
        batch_axis=0,
        **options,
    )


def _patches(found: features.BlockFeatures) -> Any:
    return found.patches[-1]


def _with_register(
    neurons: register_neurons.Neurons,
    config: vit.ViTConfig,
    params: Any,
    pixels: Any,
    blocks: tuple[int, ...],
) -> Any:
    return register_neurons.intermediates(config, params, neurons, pixels, blocks)


def score(has_truth: bool, total: np.ndarray, num_images: int) -> Scores:
    """The measures, from sums over photographs in the order of `COLUMNS`.

    NaN where there is nothing to divide by: no defective token, a photograph of one
    color.
    """
    of = dict(zip(COLUMNS, total.tolist(), strict=True))
    found = {
        "damage": 1 - _ratio(of["kept"], of["sound"]),
        "mending": 1 - _ratio(of["large"], of["large_before"]),
        "defective by norm": _ratio(of["large"], of["patches"]),
        "defective along nu": _ratio(of["along"], of["patches"]),
        "norm ratio": of["norm_ratio"] / num_images,
        "tail": of["tail"] / num_images,
        "PCA variation": _ratio(of["pca_variation"], of[PHOTOGRAPH]),
    }
    if has_truth:
        found |= {
            "truth, sound": _ratio(of["true_sound"], of["sound"]),
            "truth, thrown": _ratio(of["true_thrown"], of["thrown"]),
        }
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
