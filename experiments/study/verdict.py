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
from sinder_jax.analysis import tokens
from sinder_jax.analysis.defective import (
    LARGE_NORM,
    is_defective,
    large_norms,
    norm_ratio,
)

NOWHERE = -1

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
    block = int(found["block"])
    gaps = found["gaps"]
    return {
        "has_defect": bool(found["has_defect"]),
        "block": block,
        "gap": float(gaps[max(block, 0) :].max()),
        "blamed": weight_figures.blamed(found),
        "verdict": str(found["verdict"]),
    }


def _of_photo(study: Study, subject: Subject, photo: Photo) -> Numbers:
    """The numbers of one photograph, by the tokens that `is_defective` marks."""
    look = study.cache(study.look(subject, photo))
    norms, angles, detected = look["norms"], look["angles"], study.detected(look)
    large = np.asarray(large_norms(norms))
    counts = np.asarray(is_defective(norms, angles, detected)).sum(axis=(1, 2))
    start, end = longest_run(counts >= study.options.min_outliers)
    ratios = np.asarray(norm_ratio(norms))
    random = [tokens.separation(x, large[-1]) for x in look["cosines"]]
    return {
        "file": str(photo.path),
        "patches": norms[0].size,
        "block": start,
        "last_block": end,
        "detected": int(detected[-1].sum()),
        "large": int(large[-1].sum()),
        "defective": int(counts[-1]),
        "defective_share": float(counts[-1] / norms[-1].size),
        "norm_ratio": float(ratios[-1]),
        "largest_norm_ratio": float(ratios.max()),
        "auc": tokens.separation(-angles[-1], large[-1]),
        "random_auc": float(np.mean(random)),
        "random_auc_deviation": float(np.std(random)),
    }


def longest_run(there: np.ndarray) -> tuple[int, int]:
    """Returns first and last index of the longest run of True; (-1, -1) if none."""
    best, start = (NOWHERE, NOWHERE), 0
    for i, yes in enumerate(there):
        if not yes:
            start = i + 1
        elif best[0] == NOWHERE or i - start > best[1] - best[0]:
            best = (start, i)
    return best


def _overall(study: Study, subject: Subject, photos: dict[str, Numbers]) -> Numbers:
    each = list(photos.values())
    with_defect = [one["block"] for one in each if one["block"] != NOWHERE]
    measured = token_figures.measured_directions(study, subject)

    def mean(name: str) -> float:
        values = [one[name] for one in each if np.isfinite(one[name])]
        return float(np.mean(values)) if values else float("nan")

    blocks, counts = np.unique(with_defect, return_counts=True)
    return {
        "photographs": len(each),
        "with_defect": len(with_defect),
        "block": int(blocks[counts.argmax()]) if with_defect else NOWHERE,
        "defective_share": mean("defective_share"),
        "detected": mean("detected"),
        "large": mean("large"),
        "norm_ratio": max(one["norm_ratio"] for one in each),
        "largest_norm_ratio": max(one["largest_norm_ratio"] for one in each),
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
    """Returns a model's condition: "defect", "traces" or "sound".

    With photographs: a defect if at least half of them show it, traces if any does or
    if a norm is large. Without: the forecast from the weights.
    """
    seen = model["overall"]
    if seen is None:
        return "defect" if model["forecast"]["has_defect"] else "sound"
    if 2 * seen["with_defect"] >= seen["photographs"]:
        return "defect"
    if seen["with_defect"] or seen["norm_ratio"] > LARGE_NORM:
        return "traces"
    return "sound"


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
