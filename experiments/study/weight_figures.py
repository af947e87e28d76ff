"""Figures of the weights alone: the forecast, spectra, figure 7 of the paper.

study --draw_*--> Drawing; titles and captions are in figures.toml
"""

from typing import Any

import numpy as np

from experiments.study.cache import Arrays
from experiments.study.numbers import BLAMED, Study
from experiments.study.token_figures import Drawing, keyed
from sinder_jax.plots import weight_plots


def draw_forecast(study: Study) -> Drawing:
    """The gaps of every model, and the kernels blamed in the first."""
    found = {s: study.cache(study.forecast(s)) for s in study.subjects}
    first = carriers(found[study.first])
    gaps = {subject.name: each["gaps"] for subject, each in found.items()}
    labels = [
        f"{each['kernel']}, $\\sigma_{{{each['index']}}}$ = {each['value']:.2f}"
        for each in blamed(first)
    ]
    shares = first["blamed_share"].tolist()
    rest = {name: x for name, x in first.items() if name != "gaps"}
    figure = weight_plots.forecast(gaps, int(first["block"]), labels, shares)
    return Drawing(figure, keyed(gaps, "gaps") | rest)


def carriers(forecast: Arrays) -> Arrays:
    """A forecast that blames at most six triplets, each with a share of 1% or more."""
    enough = np.flatnonzero(np.abs(forecast["blamed_share"]) >= 0.01)[:6]
    return {
        name: values[enough] if name.startswith("blamed_") else values
        for name, values in forecast.items()
    }


def blamed(forecast: Arrays) -> list[dict[str, Any]]:
    """The triplets that a forecast blames, by "block", "kernel", "index" and so on."""
    columns = [forecast[f"blamed_{name}"] for name in BLAMED]
    return [dict(zip(BLAMED, row, strict=True)) for row in zip(*columns, strict=True)]


def draw_spectra(study: Study) -> Drawing:
    """Spectra of the first model by block."""
    found = study.cache(study.spectra(study.first))
    leading = {
        name.removeprefix("kernel "): values[:, 0]
        for name, values in found.items()
        if name.startswith("kernel ")
    }
    shares = found["share_inside"], found["share_negative"]
    return Drawing(weight_plots.spectra(leading, found["ratios"], *shares), found)


def draw_eigenvalues(study: Study) -> Drawing:
    """Eigenvalues of chosen block maps of the first model."""
    found = study.cache(study.spectra(study.first))
    arrays = {"eigenvalues": found["eigenvalues"], "blocks": np.array(study.blocks)}
    return Drawing(weight_plots.eigenvalues(found["eigenvalues"], study.blocks), arrays)


def draw_changes(study: Study) -> Drawing:
    """Figure 7: what the repair changed."""
    found = study.cache(study.changes())
    leading = {name: values[:, :3] for name, values in found.items()}
    return Drawing(weight_plots.changes(leading), found)
