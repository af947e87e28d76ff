"""Figures of the weights alone: the forecast, spectra, figure 7 of the paper.

study --draw_*--> Drawn, as in `token_figures`
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.study.cache import Arrays
from experiments.study.numbers import Study
from experiments.study.token_figures import Drawn, keyed
from sinder_jax.plots import weight_plots


def draw_forecast(study: Study) -> Iterator[Drawn]:
    """The gaps of every model, and the kernels blamed in the first."""
    found = {s: study.cache(study.forecast(s)) for s in study.subjects}
    first = carriers(found[study.first])
    gaps = {subject.name: each["gaps"] for subject, each in found.items()}
    labels = [
        f"{each['kernel']}, $\\sigma_{{{each['index']}}}$ = {each['value']:.2f}"
        for each in blamed(first)
    ]
    yield Drawn(
        "forecast",
        "Defect forecast from the weights",
        "Above, how much more the linear map of blocks 0 to i stretches its leading "
        "direction than the next one. Below, through which singular values of the "
        "defect's block the gain along ν passes; two kernels in a row carry the same "
        "share.",
        weight_plots.forecast(
            gaps, int(first["block"]), labels, first["blamed_share"].tolist()
        ),
        keyed(gaps, "gaps") | {name: x for name, x in first.items() if name != "gaps"},
    )


def carriers(forecast: Arrays) -> Arrays:
    """A forecast that blames at most six triplets, each with a share of 1% or more."""
    enough = np.flatnonzero(np.abs(forecast["blamed_share"]) >= 0.01)[:6]
    return {
        name: values[enough] if name.startswith("blamed_") else values
        for name, values in forecast.items()
    }


def blamed(forecast: Arrays) -> list[dict[str, Any]]:
    """The triplets that a forecast blames, by "block", "kernel", "index" and so on."""
    names = ("block", "kernel", "index", "value", "share")
    columns = [forecast[f"blamed_{name}"] for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def draw_spectra(study: Study) -> Iterator[Drawn]:
    """Spectra of the first model by block."""
    found = study.cache(study.spectra(study.first))
    leading = {
        name.removeprefix("kernel "): values[:, 0]
        for name, values in found.items()
        if name.startswith("kernel ")
    }
    yield Drawn(
        "spectra",
        "Singular values and eigenvalues by block",
        "The largest singular value of every kernel; the ratio of the two largest of "
        "each block's linear map; and the shares of its eigenvalues inside the unit "
        "circle (tokens shrink) and of negative real part (tokens are reversed).",
        weight_plots.spectra(
            leading, found["ratios"], found["share_inside"], found["share_negative"]
        ),
        found,
    )


def draw_eigenvalues(study: Study) -> Iterator[Drawn]:
    """Eigenvalues of chosen block maps of the first model."""
    found = study.cache(study.spectra(study.first))
    yield Drawn(
        "eigenvalues",
        "Eigenvalues of the blocks' linear maps",
        "Eigenvalues of the linear maps of single blocks in the complex plane, with "
        "the unit circle.",
        weight_plots.eigenvalues(found["eigenvalues"], study.blocks),
        {"eigenvalues": found["eigenvalues"], "blocks": np.array(study.blocks)},
    )


def draw_changes(study: Study) -> Iterator[Drawn]:
    """Figure 7: what the repair changed."""
    found = study.cache(study.changes())
    yield Drawn(
        "changes",
        "Learned minus original singular values",
        "What the repair changed of the three leading singular values of every "
        "trainable kernel, each held against the original's singular vectors.",
        weight_plots.changes({name: values[:, :3] for name, values in found.items()}),
        found,
    )
