"""The figures of an analysis: what each shows, what it needs, and its steps.

    figures.toml --> KINDS: help, needs, title and caption of every figure
    names --plan--> steps, in an order that holds one model at a time
    names --draw--> figures, see `token_figures` and `weight_figures`

The table is all that `--help` reads: JAX and matplotlib load when a figure is drawn.
"""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study.cache import Arrays, Step
    from experiments.study.numbers import Study
    from experiments.study.token_figures import Drawing


class Kind(NamedTuple):
    """One kind of figure, drawn by the function `draw_NAME`; see figures.toml."""

    help: str
    needs: str
    title: str
    caption: str


class Drawn(NamedTuple):
    """One figure.

    Attributes:
      name: of its files, without an ending.
      title: a few words.
      caption: what the figure shows and how to read it.
      figure: of matplotlib.
      arrays: the numbers in the figure.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"
    arrays: "Arrays"


KINDS = {
    name: Kind(**kind)
    for name, kind in tomllib.loads(
        Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    ).items()
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
    given = {"weights": True, "compare": compare}  # all others need photographs
    possible = [name for name, kind in KINDS.items() if given.get(kind.needs, photos)]
    for name in names:
        if name != "all" and name not in KINDS:
            raise ValueError(
                f"there is no figure {name!r}: choose of all, {', '.join(KINDS)}"
            )
        if name != "all" and name not in possible:
            how = "--compare=DIR" if KINDS[name].needs == "compare" else "an image"
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
    steps = [study.forecast(first), study.directions()]
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


def draw(study: "Study", names: Sequence[str]) -> Iterator[Drawn]:
    """Draws figures; steps that are not computed yet are computed when needed."""
    from experiments.study import token_figures, weight_figures
    from experiments.study.numbers import HIGHEST
    from sinder_jax.analysis.defective import LARGE_NORM

    count = len(study.photos)
    words = {
        "photographs": "one photograph" if count == 1 else f"{count} photographs",
        "highest": HIGHEST,
        "mask_thr": study.options.mask_thr,
        "large_norm": LARGE_NORM,
    }
    functions = {**vars(token_figures), **vars(weight_figures)}
    for name in names:
        kind, draw_kind = KINDS[name], functions[f"draw_{name}"]
        if kind.needs != "photograph":
            yield _captioned(name, kind, draw_kind(study), words)
            continue
        for photo in study.photos:
            drawing = draw_kind(study, photo)
            named = {**words, "photo": photo.name}
            yield _captioned(f"{name}-{photo.name}", kind, drawing, named)


def _captioned(
    name: str, kind: Kind, drawing: "Drawing", words: dict[str, Any]
) -> Drawn:
    words = {**words, **drawing.words}
    title, caption = (text.format(**words) for text in (kind.title, kind.caption))
    return Drawn(name, title, caption, drawing.figure, drawing.arrays)
