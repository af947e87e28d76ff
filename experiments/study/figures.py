"""The figures of an analysis: what each shows, what it needs, and its steps.

    names --plan--> steps, in an order that holds one model at a time
    names --draw--> figures, see `token_figures` and `weight_figures`

The table is all that `--help` reads: JAX and matplotlib load when a figure is drawn.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from experiments.study.cache import Step
    from experiments.study.numbers import Study
    from experiments.study.token_figures import Drawn

PHOTOGRAPHS, WEIGHTS, COMPARE = "photographs", "weights", "compare"


class Kind(NamedTuple):
    """One kind of figure, drawn by the function `draw_NAME`.

    Attributes:
      shows: what the user reads in --help.
      needs: PHOTOGRAPHS, WEIGHTS, or COMPARE, which is a second model.
    """

    shows: str
    needs: str = PHOTOGRAPHS


KINDS = {
    "pca": Kind(
        "PCA of tokens, with --compare and --registers side by side (figs. 1, 3)"
    ),
    "norms": Kind("norms of the patch tokens by block (fig. 2)"),
    "angles": Kind("angles between ν_i and the patch tokens by block (fig. 2d)"),
    "random": Kind("angles to a random direction (fig. 8)"),
    "theory": Kind("measured direction of the defective tokens against ν_i (fig. 2)"),
    "blocks": Kind("PCA, angles, detection, learning targets of some blocks (fig. 6)"),
    "growth": Kind("what attention and FFN of each block add along ν"),
    "clamp": Kind("PCA and norms with clamped singular values (fig. 5)"),
    "forecast": Kind("defect forecast; needs no image", WEIGHTS),
    "spectra": Kind(
        "singular values and eigenvalues by block; needs no image", WEIGHTS
    ),
    "eigenvalues": Kind("eigenvalues in the complex plane; needs no image", WEIGHTS),
    "changes": Kind(
        "learned minus original singular values; needs --compare (fig. 7)", COMPARE
    ),
}
"""By name, in the order of a report."""


def check_names(names: Sequence[str], *, photos: bool, compare: bool) -> list[str]:
    """Returns the figures to draw, in the order of `KINDS`.

    Args:
      names: given by the user; "all" stands for all that are possible.
      photos: True if there are photographs.
      compare: True if there is a second model.

    Raises:
      ValueError: an unknown name, or a figure that needs what is not given.
    """
    given = {WEIGHTS: True, PHOTOGRAPHS: photos, COMPARE: compare}
    possible = [name for name, kind in KINDS.items() if given[kind.needs]]
    for name in names:
        if name != "all" and name not in KINDS:
            raise ValueError(
                f"there is no figure {name!r}: choose of all, {', '.join(KINDS)}"
            )
        if name != "all" and name not in possible:
            how = "--compare=DIR" if KINDS[name].needs == COMPARE else "an image"
            raise ValueError(f"the figure {name} needs {how}")
    if "all" in names and not photos:
        raise ValueError(
            "no images: give files or folders, or draw what the weights alone show by "
            f"--figures={','.join(possible)}"
        )
    return [name for name in possible if name in names or "all" in names]


def plan(study: "Study", names: Sequence[str]) -> "list[Step]":
    """Returns the steps of some figures and of the verdict, one model after another."""
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


def draw(study: "Study", names: Sequence[str]) -> "Iterator[Drawn]":
    """Draws figures; steps that are not computed yet are computed when needed."""
    from experiments.study import token_figures, weight_figures

    for name in names:
        on_photos = KINDS[name].needs == PHOTOGRAPHS
        home = token_figures if on_photos else weight_figures
        yield from getattr(home, f"draw_{name}")(study)
