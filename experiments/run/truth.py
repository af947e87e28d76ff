"""What a repair gives back of a planted model, against the truth: the model before.

    checkpoint, photographs --plant--> planted.safetensors, planted.json
    truth; planted, repaired and controls --compare--> cosines, defective patches

Three controls show what is the repair's own doing: no repair, singular values clamped
at the largest γ that removes as many defects, and the same repair along random
directions.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32
from ml_collections import ConfigDict

from experiments.run.workdir import Workdir
from sinder_jax import families, planted, repair, vit
from sinder_jax.analysis import defective
from sinder_jax.analysis.tokens import last_patches, random_directions, token_norms
from sinder_jax.data import batches, decode
from sinder_jax.data.listing import Photograph
from sinder_jax.model import Model
from sinder_jax.remedies import clamping
from sinder_jax.storage import files
from sinder_jax.storage.original import Original

PLANTED_ON = 8  # photographs
TOLD = "planted.json"
GAMMAS = 14  # tried for the clamped control, from the largest singular value down ...
SMALLEST_GAMMA = 0.3  # ... to this


def block(config: ConfigDict, depth: int) -> int:
    """The block of `config.plant`.

    Raises:
      ValueError: not a block of the model.
    """
    if not (config.plant.isdecimal() and int(config.plant) < depth):
        raise ValueError(
            f"config.plant must be a block from 0 to {depth - 1}, got {config.plant!r}"
        )
    return int(config.plant)


def plant(
    config: ConfigDict, model: Model, photographs: Sequence[Photograph], place: Path
) -> planted.PlantedModel:
    """Plants a defect in a model and writes what is true of it beside `place`.

    Args:
      config: of the run.
      model: the truth.
      photographs: readable ones, to choose spots and threshold on.
      place: of the planted model's file.
    """
    images = np.stack([_pixels(config, model.config, each) for each in photographs])
    made = planted.plant(
        model, images, block=block(config, model.config.depth), seed=config.seed
    )
    told = {"block": made.block, "unit": made.unit}
    told["direction"] = made.direction.tolist()
    files.write(place.with_name(TOLD), json.dumps(told).encode())
    return made


def _pixels(
    config: ConfigDict, model: vit.ViTConfig, photograph: Photograph
) -> Float32[np.ndarray, "height width 3"]:
    crop = decode.training_crop(
        photograph.read(), config.image_size, patch_size=model.patch_size
    )
    return decode.normalize(crop, families.of(model).statistics)


# --- Against the truth ----------------------------------------------------------------


class Seen(NamedTuple):
    """One photograph, what the truth makes of it, and where the planted model fails."""

    image: Float32[np.ndarray, "height width 3"]
    truth: Float[np.ndarray, "H W D"]
    defective: Bool[np.ndarray, "H W"]


class Comparison:
    """Measures models on photographs against the model before planting.

    A token is defective if its norm in the planted model's last block is more than
    `defective.LARGE_NORM` times the median; all others are sound.

    Args:
      config: of the run.
      truth: the model before planting.
      planted_params: the params after planting.
      sets: readable photographs by name.
    """

    def __init__(
        self,
        config: ConfigDict,
        truth: Model,
        planted_params: Any,
        sets: Mapping[str, Sequence[Photograph]],
    ):
        self._model, before = truth.config, jax.device_put(truth.params)
        planted_params = jax.device_put(planted_params)
        self._sets: dict[str, list[Seen]] = {}
        for name, photographs in sets.items():
            images = [_pixels(config, self._model, each) for each in photographs]
            self._sets[name] = [
                Seen(x, self._last(before, x), _large(self._last(planted_params, x)))
                for x in images
            ]

    def _last(self, params: Any, image: np.ndarray) -> np.ndarray:
        return np.asarray(last_patches(self._model, params, image))

    def measure(self, params: Any) -> dict[str, dict[str, float | None]]:
        """Cosines with the truth and share of defective patches, by set of photographs.

        Cosines are means over all tokens of a set; None where there is no such token.
        """
        params = jax.device_put(params)
        return {
            name: _scores(seen, [self._last(params, each.image) for each in seen])
            for name, seen in self._sets.items()
        }


def _large(tokens: np.ndarray) -> Bool[np.ndarray, "H W"]:
    return np.asarray(defective.large_norms(token_norms(tokens)))


def _scores(seen: Sequence[Seen], now: Sequence[np.ndarray]) -> dict[str, float | None]:
    def cosines(one: Seen, tokens: np.ndarray) -> np.ndarray:
        product = (one.truth * tokens).sum(axis=-1)
        norms = np.linalg.norm(one.truth, axis=-1) * np.linalg.norm(tokens, axis=-1)
        return (product / norms).ravel()

    cosine = np.concatenate([cosines(*pair) for pair in zip(seen, now, strict=True)])
    flawed = np.concatenate([one.defective.ravel() for one in seen])
    return {
        "defective_patches": float(np.mean([_large(tokens).sum() for tokens in now])),
        "cosine_of_defective_tokens": _mean(cosine[flawed]),
        "cosine_of_sound_tokens": _mean(cosine[~flawed]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def compare(
    workdir: Workdir,
    config: ConfigDict,
    options: repair.RepairOptions,
    truth: Model,
    original: Original,
    train: Sequence[Photograph],
    sets: Mapping[str, Sequence[Photograph]],
    repaired: Any,
    num_images: int,
) -> dict[str, Any]:
    """What summary.json says of a repair against the truth, and prints it line by line.

    Args:
      workdir: holds what `plant` told.
      config: of the run.
      options: of the repair.
      truth: the model before planting.
      original: the planted model, and its factors.
      train: the training list.
      sets: photographs to measure on, by name; the first is of `train`.
      repaired: the repaired params.
      num_images: images that the repair took.

    Returns:
      "planted": block and unit; and for "no_repair", "repair", "clamped" (with its γ)
      and "random_directions" what `Comparison.measure` returns.
    """
    told = json.loads((workdir.path / TOLD).read_bytes())
    comparison = Comparison(config, truth, original.model.params, sets)
    found = {
        "no_repair": comparison.measure(original.model.params),
        "repair": comparison.measure(repaired),
    }
    first = next(iter(sets))
    gamma, clamped = _clamped_as_good(
        original, comparison, first, found["repair"][first]["defective_patches"]
    )
    found["clamped"] = clamped
    along_random = _along_random(config, options, original, train, num_images)
    found["random_directions"] = comparison.measure(along_random)
    for name, measures in found.items():
        print(_describe(name.replace("_", " "), measures))
    about = {"block": told["block"], "unit": told["unit"], "clamped_at": gamma}
    return {**about, **found}


def _clamped_as_good(
    original: Original, comparison: Comparison, name: str, wanted: Any
) -> tuple[float, dict[str, Any]]:
    """The largest γ that leaves no more defects than `wanted`, else the smallest."""
    model = original.model
    largest = max(float(s.max()) for s in original.factors.sigma.values())
    gammas = np.geomspace(largest, SMALLEST_GAMMA, GAMMAS + 1)[1:].tolist()
    clamped = clamping.clamp_all(model.config, model.params, gammas)
    tried = ((gamma, comparison.measure(params)) for gamma, params in clamped)
    gamma, measures = next(tried)
    while measures[name]["defective_patches"] > wanted and gamma > gammas[-1]:
        gamma, measures = next(tried)
    return gamma, measures


def _along_random(
    config: ConfigDict,
    options: repair.RepairOptions,
    original: Original,
    train: Sequence[Photograph],
    num_images: int,
) -> Any:
    """Params after the same repair along random directions, over as many images."""
    model = original.model.config
    directions = random_directions(
        jax.random.key(config.seed), model.depth, model.embed_dim
    )
    frozen, state = repair.init(
        model, original.model.params, options, directions, original.factors
    )
    step = repair.make_step(model, options)
    stream = batches.stream(
        train,
        config.image_size,
        patch_size=model.patch_size,
        statistics=families.of(model).statistics,
        start=0,
        batch_size=1,
        part=(0, 1),
        num_threads=config.read_threads,
        num_workers=config.read_workers,
        resize=config.resize,
    )
    for _ in range(num_images):
        images = next(stream)
        if images.valid.all():
            state, _ = step(state, frozen, images.images)
    stream.close()
    return repair.merged_params(frozen, state)


def _describe(name: str, measures: Mapping[str, Mapping[str, float | None]]) -> str:
    def of(numbers: Mapping[str, float | None]) -> str:
        flawed = numbers["cosine_of_defective_tokens"]
        sound = numbers["cosine_of_sound_tokens"]
        return (
            f"{numbers['defective_patches']:.2f} defective patches, cosine with the "
            f"truth {_shown(flawed)} defective, {_shown(sound)} sound"
        )

    parts = [f"{key.replace('_', ' ')} {of(x)}" for key, x in measures.items()]
    return f"{name}: {'; '.join(parts)}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
