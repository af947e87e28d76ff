"""The findings of an analysis: numbers for a file, and sentences for a reader.

study --summarize--> numbers by model and photograph (JSON values)
numbers --headline, paragraphs--> the verdict, from these numbers alone; its sentences
    are in verdict.txt.j2
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from experiments.study import token_figures, weight_figures
from experiments.study.cache import Arrays
from experiments.study.numbers import HIGHEST, NUM_RANDOM, Study, Subject
from experiments.study.photos import Photo
from sinder_jax.analysis import diagnosis, tokens
from sinder_jax.analysis.defective import LARGE_NORM, large_norms

CHANNELS = 3  # of ν that are named

Numbers = dict[str, Any]

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name == "report.html.j2",
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {"highest": HIGHEST, "large_norm": LARGE_NORM}


# --- Numbers --------------------------------------------------------------------------


def summarize(study: Study) -> Numbers:
    """Returns all numbers of the report, as JSON values.

    Returns:
      "models", an entry per model with "forecast", "photographs" by name, and
      "overall" for all photographs; "options"; "kernels", the changes of a repair, or
      None.
    """
    options = dataclasses.asdict(study.options) | {"blocks": list(study.blocks)}
    return _plain(
        {
            "models": [_of_model(study, subject) for subject in study.subjects],
            "options": options,
            "kernels": _kernels(study) if len(study.subjects) > 1 else None,
        }
    )


def _of_model(study: Study, subject: Subject) -> Numbers:
    photos = {photo.name: _of_photo(study, subject, photo) for photo in study.photos}
    return {
        "name": subject.name,
        "path": str(subject.model.path),
        "digest": subject.model.digest,
        "architecture": subject.model.config.as_dict(),
        "parameters": subject.model.num_params,
        "provenance": dict(subject.model.provenance),
        "forecast": _of_forecast(study.cache(study.forecast(subject))),
        "photographs": photos,
        "overall": _overall(study, subject, photos) if photos else None,
    }


def _of_forecast(found: Arrays) -> Numbers:
    found = weight_figures.carriers(found)
    block, has_defect = int(found["block"]), bool(found["has_defect"])
    gaps = found["gaps"]
    sizes = np.abs(found["directions"][block])
    largest = np.argsort(-sizes, kind="stable")[:CHANNELS]
    return {
        "has_defect": has_defect,
        "block": block,
        "channels": [(i, sizes[i]) for i in largest] if has_defect else None,
        "gap": float(gaps[max(block, 0) :].max()),
        "blamed": weight_figures.blamed(found),
        "verdict": str(found["verdict"]),
    }


def _of_photo(study: Study, subject: Subject, photo: Photo) -> Numbers:
    """The numbers of one photograph, by the tokens that `is_defective` marks."""
    look = study.cache(study.look(subject, photo))
    seen = _sighting(study, subject, photo)
    large = np.asarray(large_norms(look["norms"][-1]))
    random = [tokens.separation(x, large) for x in look["cosines"]]
    return {
        "file": str(photo.path),
        "patches": seen.patches,
        "block": seen.block,
        "last_block": seen.last_block,
        "detected": seen.outliers[-1],
        "large": seen.large[-1],
        "defective": seen.defective[-1],
        "defective_share": seen.defective[-1] / seen.patches,
        "norm_ratio": seen.norm_ratio[-1],
        "largest_norm_ratio": seen.norm_ratio.max(),
        "auc": tokens.separation(-look["angles"][-1], large),
        "random_auc": float(np.mean(random)),
        "random_auc_deviation": float(np.std(random)),
    }


def _sighting(study: Study, subject: Subject, photo: Photo) -> diagnosis.Sighting:
    look = study.cache(study.look(subject, photo))
    found = diagnosis.Look(look["norms"], look["angles"], study.detected(look))
    return diagnosis.sighting(found, min_outliers=study.options.min_outliers)


def _overall(study: Study, subject: Subject, photos: dict[str, Numbers]) -> Numbers:
    each = list(photos.values())
    seen = diagnosis.over_all(
        [_sighting(study, subject, photo) for photo in study.photos]
    )
    measured = token_figures.measured_directions(study, subject)

    def mean(name: str) -> float:
        values = [one[name] for one in each if np.isfinite(one[name])]
        return float(np.mean(values)) if values else float("nan")

    return {
        "photographs": seen.photographs,
        "with_defect": seen.with_defect,
        "block": seen.block,
        "defective_share": mean("defective_share"),
        "detected": mean("detected"),
        "large": mean("large"),
        "norm_ratio": seen.norm_ratio[-1],
        "largest_norm_ratio": seen.norm_ratio.max(),
        "angle_to_theory": float(measured["to_theory"][-1]),
        "spread": float(measured["spread"][-1]),
        "auc": mean("auc"),
        "random_auc": mean("random_auc"),
        "random_directions": NUM_RANDOM,
    }


def _kernels(study: Study) -> list[Numbers]:
    """The blamed singular values of the first model, before and after."""
    before, after = study.subjects
    found = weight_figures.carriers(study.cache(study.forecast(before)))
    rows = []
    for each in weight_figures.blamed(found):
        index, value = each["index"], each["value"]
        changes = study.cache(study.changes())[str(each["kernel"])][each["block"]]
        if index < len(changes):
            place = {name: each[name] for name in ("block", "kernel", "index")}
            rows.append({**place, "before": value, "after": value + changes[index]})
    return rows


def _plain(value: Any) -> Any:
    """Converts to JSON values; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


# --- Words ----------------------------------------------------------------------------


def condition(model: Numbers) -> str:
    """Returns a model's condition, see `diagnosis.condition`."""
    seen = model["overall"] or {"photographs": 0, "with_defect": 0, "norm_ratio": 1.0}
    return diagnosis.condition(
        model["forecast"]["has_defect"],
        seen["photographs"],
        seen["with_defect"],
        seen["norm_ratio"],
    )


def headline(summary: Numbers) -> str:
    """Returns the verdict in one sentence."""
    models = summary["models"]
    conditions = condition(models[0]), condition(models[-1])
    return _say("headline", *conditions, len(models) > 1, models[0]["overall"])


def paragraphs(summary: Numbers) -> dict[str, str]:
    """Returns paragraphs by title: one per model, and one that compares two models."""
    models, kernels = summary["models"], summary["kernels"]
    found = {}
    for model in models:
        forecast, seen = model["forecast"], model["overall"]
        texts = [
            forecast["verdict"],
            *([_say("observed", forecast, seen)] if seen else []),
        ]
        found[model["name"].capitalize()] = " ".join(texts)
    if len(models) > 1:
        conditions = [condition(model) for model in models]
        overall = [model["overall"] for model in models]
        smaller = sum(row["after"] < row["before"] for row in kernels)
        found["Compared"] = _say("compared", *conditions, *overall, kernels, smaller)
    return found


def _say(macro: str, *facts: Any) -> str:
    """Fills in a macro of verdict.txt.j2; line breaks become spaces."""
    sentences = TEMPLATES.get_template("verdict.txt.j2").module
    return re.sub(r"[ \n]+", " ", getattr(sentences, macro)(*facts)).strip(" ")
