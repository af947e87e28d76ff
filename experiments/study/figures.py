"""The figures of an analysis: what each needs, and which steps come first.

names --plan--> steps, in an order that holds one model at a time
names --draw--> figures, see `token_figures` and `weight_figures`
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from experiments.study import token_figures, weight_figures
from experiments.study.cache import Step
from experiments.study.study import Study
from experiments.study.token_figures import Drawn


class Kind(NamedTuple):
    """One sort of figure.

    Attributes:
      draw: gives one figure, or one for each photograph.
      needs: "photographs", "weights" or "compare", a second model.
    """

    draw: Callable[[Study], Iterator[Drawn]]
    needs: str = "photographs"


def check_names(names: Sequence[str], *, photos: bool, compare: bool) -> list[str]:
    """The figures to draw, in the order of `KINDS`.

    Args:
      names: given by the user; "all" stands for all that are possible.
      photos: whether there are photographs.
      compare: whether there is a second model.

    Raises:
      ValueError: an unknown name, or one that cannot be drawn of what is there.
    """
    there = {"weights": True, "photographs": photos, "compare": compare}
    for name in names:
        if name != "all" and name not in KINDS:
            raise ValueError(
                f"there is no figure {name!r}: choose of all, {', '.join(KINDS)}"
            )
        if name != "all" and not there[KINDS[name].needs]:
            how = "--compare=DIR" if KINDS[name].needs == "compare" else "an image"
            raise ValueError(f"the figure {name} needs {how}")
    if "all" in names and not photos:
        alone = ",".join(name for name, kind in KINDS.items() if there[kind.needs])
        raise ValueError(
            "no images: give files or folders, or draw what the weights alone show by "
            f"--figures={alone}"
        )
    return [
        name
        for name, kind in KINDS.items()
        if name in names or ("all" in names and there[kind.needs])
    ]


def plan(study: Study, names: Sequence[str]) -> list[Step]:
    """The steps of some figures and of the verdict, one model after the other."""
    first = study.first
    steps = [study.forecast(first), study.directions(first)]
    if {"spectra", "eigenvalues", "theory"} & set(names):
        steps.append(study.spectra(first))
    for photo in study.photos:
        steps.append(study.look(first, photo))
        if "blocks" in names:
            steps.append(study.panels(photo))
        if "growth" in names:
            steps.append(study.growth(photo))
    if "clamp" in names:
        steps += [
            study.clamped(gamma, photo)
            for gamma in study.options.gammas
            for photo in study.photos
        ]
    for after in study.subjects[1:]:
        steps.append(study.forecast(after))
        steps += [study.look(after, photo) for photo in study.photos]
        steps.append(study.changes())
    if study.registers is not None and "pca" in names:
        steps += [study.seen(study.registers, photo) for photo in study.photos]
    return steps


def draw(study: Study, names: Sequence[str]) -> Iterator[Drawn]:
    """Draws the figures, whose steps are computed by now or when they are needed."""
    for name in names:
        yield from KINDS[name].draw(study)


KINDS: dict[str, Kind] = {
    "pca": Kind(token_figures.draw_pca),
    "norms": Kind(token_figures.draw_norms),
    "angles": Kind(token_figures.draw_angles),
    "random": Kind(token_figures.draw_random),
    "theory": Kind(token_figures.draw_theory),
    "blocks": Kind(token_figures.draw_blocks),
    "growth": Kind(token_figures.draw_growth),
    "clamp": Kind(token_figures.draw_clamp),
    "forecast": Kind(weight_figures.draw_forecast, "weights"),
    "spectra": Kind(weight_figures.draw_spectra, "weights"),
    "eigenvalues": Kind(weight_figures.draw_eigenvalues, "weights"),
    "changes": Kind(weight_figures.draw_changes, "compare"),
}
"""By name, in the order of a report; `analyze.FIGURES` says what they show."""
