"""Figures of photographs' tokens: figures 1-3, 5, 6 and 8 of the paper.

study --draw_*--> Drawn: a name, a figure, the arrays it shows, a caption
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.study.cache import Arrays
from experiments.study.numbers import HIGHEST, TEMPERATURES, Study, Subject
from experiments.study.photos import Photo
from sinder_jax.analysis import defective, tokens
from sinder_jax.plots import token_plots


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
    figure: Figure
    arrays: Arrays


def _flat(array: np.ndarray) -> np.ndarray:
    """[L, H, W] as [L, N]."""
    return array.reshape(len(array), -1)


def _name(study: Study, subject: Subject) -> str:
    """The title of a model's panel; empty where there is only one model."""
    return subject.name if len(study.subjects) > 1 else ""


def _looks(study: Study, photo: Photo) -> dict[str, Arrays]:
    """The arrays of `Study.look` by model, with the outliers as "detected"."""
    found = {}
    for subject in study.subjects:
        look = study.cache(study.look(subject, photo))
        found[_name(study, subject)] = {**look, "detected": study.detected(look)}
    return found


def keyed(parts: dict[str, np.ndarray], what: str) -> Arrays:
    """Arrays under names like "norms before"."""
    return {f"{what} {name}".strip(): array for name, array in parts.items()}


def draw_norms(study: Study) -> Iterator[Drawn]:
    """Figure 2: norms by block, of all photographs together."""
    looks = [_looks(study, photo) for photo in study.photos]
    values, marked = (
        {
            name: np.concatenate([_flat(look[name][what]) for look in looks], axis=1)
            for name in looks[0]
        }
        for what in ("norms", "detected")
    )
    yield Drawn(
        "norms",
        "Norms of the patch tokens",
        f"Norms of the patch tokens after every block, {_count(study)} together, on a "
        "logarithmic axis. Dots are the tokens that are detected along ν_i (equation "
        "5). A singular defect shows as dots far above the violins from one block on.",
        token_plots.norms(values, marked),
        keyed(values, "norms") | keyed(marked, "detected"),
    )


def draw_angles(study: Study) -> Iterator[Drawn]:
    """Figure 2d: angles to ν_i by block, one figure per photograph."""
    return _angle_figures(
        study,
        "angles",
        r"$\nu_i$",
        "Angle between the singular defect direction ν_i and the patch tokens",
        "Computed from the weights alone, ν_i sets the defective tokens (dots) "
        "apart from all others (violins) by small angles.",
    )


def draw_random(study: Study) -> Iterator[Drawn]:
    """Figure 8: angles to a random direction, one figure per photograph."""
    return _angle_figures(
        study,
        "random",
        "a random direction",
        "Angle between a random direction and the patch tokens",
        "The control: the same defective tokens (dots), but a random direction. "
        "They do not stand apart where it is no accident.",
    )


def _angle_figures(
    study: Study, name: str, direction: str, title: str, reading: str
) -> Iterator[Drawn]:
    for photo in study.photos:
        looks = _looks(study, photo)
        values = {model: _flat(look[name]) for model, look in looks.items()}
        marked = {model: _flat(look["detected"]) for model, look in looks.items()}
        yield Drawn(
            f"{name}-{photo.name}",
            f"{title}, {photo.name}",
            reading,
            token_plots.angles(values, marked, direction=direction),
            keyed(values, name) | keyed(marked, "detected"),
        )


def measured_directions(study: Study, subject: Subject) -> Arrays:
    """The direction of the highest-norm tokens, block by block, over the photographs.

    Returns:
      "direction" [L, D], "spread" [L], "pairwise" [L, pairs] and "to_theory" [L], its
      angle to the first model's ν_i, in degrees.
    """
    looks = [study.cache(study.look(subject, photo)) for photo in study.photos]
    highest = np.stack([look["highest"] for look in looks], axis=1)[:, :, None]
    found = jax.device_get(_empirical(highest))
    nu = study.cache(study.directions(study.first))["directions"]
    above = np.triu_indices(len(looks), 1)
    return {
        "direction": found.direction,
        "spread": found.spread,
        "pairwise": found.pairwise[:, *above],
        "to_theory": np.asarray(_angle(found.direction, nu.astype(np.float32))),
    }


@jax.jit
def _empirical(highest):
    count = min(HIGHEST, highest.shape[3])
    return jax.vmap(lambda x: tokens.empirical_direction(x, count=count))(highest)


_angle = jax.jit(jax.vmap(tokens.angles))


def draw_theory(study: Study) -> Iterator[Drawn]:
    """Figure 2: the measured direction against ν_i."""
    found = measured_directions(study, study.first)
    maps = study.cache(study.spectra(study.first))
    direction = found["direction"]
    key = jax.random.key(study.options.seed)
    random = tokens.random_directions(key, 1, direction.shape[1])
    arrays = found | {
        "to_layerwise": np.asarray(
            _angle(direction, maps["directions"].astype(np.float32))
        ),
        "to_random": np.asarray(tokens.angles(direction, random[0])),
    }
    yield Drawn(
        "theory",
        "Theory against experience",
        f"Measured is the mean direction of the {direction_tokens()} of each "
        f"photograph, block by block, {_count(study)}. Blue: its angle to the "
        "direction ν_i that the weights predict; near 0 from the block on where the "
        "defect appears. Green band and vermilion dashes: how little the photographs "
        "differ. Gray: a random direction.",
        token_plots.theory(
            **{name: x for name, x in arrays.items() if name != "direction"}
        ),
        arrays,
    )


def direction_tokens() -> str:
    """Says which tokens' direction is measured."""
    return f"{HIGHEST} patch tokens of highest norm"


def draw_pca(study: Study) -> Iterator[Drawn]:
    """Figures 1 and 3: PCA model by model, one figure per photograph."""
    for photo in study.photos:
        parts = {s.name: study.look(s, photo) for s in study.subjects}
        if study.registers is not None:
            parts["with registers"] = study.seen(study.registers, photo)
        pictures = {name: study.cache(step)["pca"] for name, step in parts.items()}
        if len(pictures) == 1:
            pictures = {"PCA of tokens": next(iter(pictures.values()))}
        yield Drawn(
            f"pca-{photo.name}",
            f"PCA of the patch tokens, {photo.name}",
            "The three leading principal components of the last block's patch tokens "
            "as red, green and blue, each picture by its own components (appendix A). "
            "Defective tokens are isolated patches of glaring color.",
            token_plots.pca(photo.pixels, pictures),
            {"photograph": photo.pixels} | keyed(pictures, "pca"),
        )


def draw_blocks(study: Study) -> Iterator[Drawn]:
    """Figure 6: chosen blocks of the first model, one figure per photograph."""
    chosen = list(study.blocks)
    for photo in study.photos:
        look = study.cache(study.look(study.first, photo))
        panels = study.cache(study.panels(photo))
        detected = study.detected(look)
        targets = {tau: panels["targets"][:, i] for i, tau in enumerate(TEMPERATURES)}
        yield Drawn(
            f"blocks-{photo.name}",
            f"Angles, detection and learning targets by block, {photo.name}",
            "Above, the angles between ν_i and the patch tokens; gray: the blocks "
            "shown below. There, from above: PCA of the tokens, angle to ν_i (dark "
            f"means small), tokens detected at μ = {study.options.mask_thr:g}, and the "
            "learning target (equation 7) of every token at three temperatures.",
            token_plots.blocks(
                _flat(look["angles"]),
                _flat(detected),
                chosen,
                pca=panels["pca"],
                heat=look["angles"][chosen],
                detected=detected[chosen],
                targets=targets,
                mask_thr=study.options.mask_thr,
            ),
            {
                "angles": look["angles"],
                "detected": detected,
                "blocks": np.array(chosen),
                "pca": panels["pca"],
                "targets": panels["targets"],
                "temperatures": np.array(TEMPERATURES),
            },
        )


def draw_clamp(study: Study) -> Iterator[Drawn]:
    """Figure 5: the first model clamped, one figure per photograph."""
    for photo in study.photos:
        look = study.cache(study.look(study.first, photo))
        pictures = {"not clamped": look["pca"]}
        grids = {"not clamped": look["norms"][-1]}
        for gamma in study.options.gammas:
            clamped = study.cache(study.clamped(gamma, photo))
            pictures[f"γ = {gamma:g}"] = clamped["pca"]
            grids[f"γ = {gamma:g}"] = clamped["norms"]
        norms = {name: each.ravel() for name, each in grids.items()}
        large = {
            name: np.ravel(defective.large_norms(each)) for name, each in grids.items()
        }
        yield Drawn(
            f"clamp-{photo.name}",
            f"Clamping the singular values of linear layers, {photo.name}",
            "Every linear layer's singular values cut off at γ: PCA and norms of the "
            "last block's patch tokens, on one scale. As γ falls, so do the norms of "
            f"defective tokens (dots: above {defective.LARGE_NORM:g} x the median).",
            token_plots.clamping(pictures, norms, large),
            keyed(pictures, "pca") | keyed(norms, "norms"),
        )


def draw_growth(study: Study) -> Iterator[Drawn]:
    """Growth of the first model's tokens along the ν of the last block."""
    for photo in study.photos:
        look = study.cache(study.look(study.first, photo))
        found = study.cache(study.growth(photo))
        mask, which = study.detected(look)[-1], "tokens detected in the last block"
        if not mask.any():
            highest = np.sort(look["norms"][-1].ravel())[-HIGHEST:][0]
            mask, which = look["norms"][-1] >= highest, direction_tokens()
        parts = [found["attention"][:, mask], found["ffn"][:, mask]]
        # A direction has no sign: most of these tokens are to end up on its side.
        sign = -1.0 if np.median(found["end"][mask]) < 0 else 1.0
        yield Drawn(
            f"growth-{photo.name}",
            f"What each block adds along ν, {photo.name}",
            "How much the attention and the FFN of each block add to a token's part "
            f"along ν of the last block: mean over the {mask.sum()} {which}. The sum "
            "of all is the black line.",
            token_plots.growth(
                *(sign * part for part in parts), sign * found["start"][mask]
            ),
            found | {"tokens": mask},
        )


def _count(study: Study) -> str:
    count = len(study.photos)
    return f"{count} photographs" if count > 1 else "one photograph"
