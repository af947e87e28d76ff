"""How defective patch tokens are, and what a remedy damages: the protocol `artifacts`.

    photographs --each model's last block--> tokens, kept as features
    tokens, those of the first model, those of the truth --sums--> a row a photograph
    config.knn, config.segmentation --their protocols--> their main metric beside

The first checkpoint is what all others, and what remedies make of it, are compared
with. All are measured on the same photographs; those that a remedy reads are others.
A model trained with registers has a feature space of its own: nothing is compared token
by token, and its direction is its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import convert
from experiments.configs.evals import knn as knn_config
from experiments.configs.evals import segmentation_linear as segmentation_config
from experiments.evaluation import images, knn, remedied, segmentation
from experiments.evaluation.job import AS_IT_IS, Job, Result, Scores
from sinder_jax import loss
from sinder_jax.analysis import artifacts, forecast
from sinder_jax.data import decode, listing
from sinder_jax.data.listing import Photograph
from sinder_jax.evals import features
from sinder_jax.model import Model, check_same_architecture

# Protocols that evaluate each model too, by the key of the config with their data.
ALSO = {
    "knn": (knn, knn_config.get_config),
    "segmentation": (segmentation, segmentation_config.get_config),
}
PHOTOGRAPH = "photograph_variation"
VERSUS = (("damage", "mending"),)
AGAINST_TRUTH = ("truth, sound", "truth, thrown")
COSINES = ("kept", "true_sound", "true_thrown")
COLUMNS = (*artifacts.Sums._fields, PHOTOGRAPH)


@dataclasses.dataclass(frozen=True)
class Data:
    """What all rows have in common.

    Attributes:
      first: the model before any remedy.
      truth: the model before planting, or None.
      photographs: to measure on.
      also: config and data of other protocols, by a key of `ALSO`.
    """

    first: Model
    truth: Model | None
    photographs: list[Photograph]
    also: dict[str, tuple[ConfigDict, Any]]

    @functools.cached_property
    def told(self) -> forecast.Forecast:
        """What the first model's weights say."""
        return forecast.forecast(self.first.config, self.first.params)


# --- Before anything is computed ------------------------------------------------------


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Lists the photographs and opens the truth; errors as `listing.open_photographs`.

    Raises:
      ValueError: a setting out of range; models of different architectures, or that
        resample position embeddings differently for these images; too few photographs.
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
    truth = convert.open_model(config.truth) if config.truth else None
    if truth:
        check_same_architecture(first, truth)
    for other in (*models[1:], *filter(None, [truth])):
        different = images.differently_resampled(first, other)
        own = {first.config.img_size, other.config.img_size}
        if different and own != {config.image_size}:
            key = f"--config.image_size={first.config.img_size}"
            alone = f" but at {key}, where nothing is resampled" * (len(own) == 1)
            raise ValueError(f"{different}: their tokens cannot be compared{alone}")
    registers = first.config.num_register_tokens
    for other in models[1:]:
        as_first = dataclasses.replace(other.config, num_register_tokens=registers)
        check_same_architecture(first, dataclasses.replace(other, config=as_first))
    photographs = chosen(config)
    return Data(first, truth, photographs, prepare_also(config, models))


def prepare_also(
    config: ConfigDict, models: Sequence[Model]
) -> dict[str, tuple[ConfigDict, Any]]:
    """Settings and data of the protocols of `ALSO` for which there is data.

    Raises:
      ValueError, FileNotFoundError: as their `prepare`; names the key.
    """
    found = {}
    for name, (module, get_config) in ALSO.items():
        if not config[name]:
            continue
        own = get_config()
        same = ["matmul_precision", "read_threads", "read_workers", "resamples", "seed"]
        same += ["cache", "cache_dtype"] * (own.protocol in images.KEEPING)
        own.update({key: config[key] for key in same})
        own.data = config[name]
        if "pictures" in own:
            own.pictures = 0
        try:
            found[name] = own, module.prepare(own, models)
        except (ValueError, FileNotFoundError) as error:
            kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
            raise kind(
                f"config.{name}={config[name]}, as {own.protocol}.py takes it: {error}"
            ) from None
    return found


def chosen(config: ConfigDict) -> list[Photograph]:
    """The photographs to measure on: none that a remedy reads.

    Raises:
      ValueError: no data given, or no photograph left.
    """
    if not config.data:
        raise ValueError(
            "no photographs: add --config.data=FOLDER, or --config.data=sample:crops "
            "for those inside scikit-image"
        )
    found = listing.open_photographs(config.data)
    read = remedied.prepare(config).photographs
    rest = remedied.but(found, read)
    if not rest:
        raise ValueError(
            f"config.remedy_images: {config.data} has no photographs to measure on but "
            f"those that remedies read ({len(read)}) and crops of them; give fewer, or "
            "others by --config.remedy_data="
        )
    return remedied.spread(rest, config.num_images)


# --- One model ------------------------------------------------------------------------


def run(job: Job) -> Result:
    """Measures a model beside the first checkpoint and the truth."""
    data, model = job.data, job.model
    registers = model.config.num_register_tokens
    comparable = registers == data.first.config.num_register_tokens
    told = data.told if comparable else forecast.forecast(model.config, model.params)
    now, before = tokens(job), tokens_of(job, data.first)
    truth = None if data.truth is None else tokens_of(job, data.truth)
    read, rows = images.Read(data.photographs, _read(job)), []
    job.progress.begin("photographs measured", len(now))
    for i in range(len(now)):
        found = artifacts.sums(
            np.asarray(now[i], np.float32),
            np.asarray(before[i], np.float32),
            told.directions[-1].astype(np.float32),
            None if truth is None else np.asarray(truth[i], np.float32),
            mask_thr=float(job.config.mask_thr),
        )
        undefined = list(() if comparable else COSINES)
        if not told.has_defect:
            undefined.append("along")
        found = found._replace(**dict.fromkeys(undefined, np.nan))
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
            **({} if comparable else {"registers": registers}),
        },
        lower_is_better=None,
        versus=VERSUS if data.truth is None else (*VERSUS, AGAINST_TRUTH),
        also={name: _also(job, name) for name in data.also},
    )


def _also(job: Job, name: str) -> Result:
    """What another protocol says of the job's model."""
    config, data = job.data.also[name]
    folder = job.folder / name
    folder.mkdir(exist_ok=True)
    return ALSO[name][0].run(job._replace(config=config, data=data, folder=folder))


def _read(job: Job) -> Callable[[Any], Any]:
    return functools.partial(
        decode.training_crop,
        size=job.config.image_size,
        patch_size=job.model.config.patch_size,
    )


def tokens_of(job: Job, model: Model) -> np.ndarray:
    """`tokens` of another model, as it is."""
    return tokens(job._replace(model=model, forward=AS_IT_IS))


def tokens(job: Job) -> np.ndarray:
    """Raw patch tokens of the last block, [n, H, W, D], as a memory map."""
    config, model = job.config, job.model
    side = config.image_size // model.config.patch_size
    return images.cached(
        job,
        "photographs",
        job.data.photographs,
        _read(job),
        (side, side, model.config.embed_dim),
        {"features": "raw patch tokens", "size": config.image_size},
        blocks=features.last_blocks(model.config, 1),
        norm=False,
        of=_patches,
        batch_axis=0,
    )


def _patches(found: features.BlockFeatures) -> Any:
    return found.patches[-1]


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
