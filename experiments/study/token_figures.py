"""Figures of photographs' tokens: figures 1-3, 5, 6 and 8 of the paper.

study --draw_*--> Drawing; titles and captions are in figures.toml
"""

from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.study.cache import Arrays
from experiments.study.numbers import HIGHEST, TEMPERATURES, Study, Subject
from experiments.study.photos import Photo
from sinder_jax.analysis import defective, tokens
from sinder_jax.plots import token_plots


class Drawing(NamedTuple):
    """What the functions `draw_NAME` return.

    Attributes:
      figure: of matplotlib.
      arrays: the numbers in the figure.
      words: for the braces of the caption, where they depend on the numbers.
    """

    figure: Figure
    arrays: Arrays
    words: dict[str, str] = {}


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


def draw_norms(study: Study) -> Drawing:
    """Figure 2: norms by block, of all photographs together."""
    looks = [_looks(study, photo) for photo in study.photos]
    values, marked = (
        {
            name: np.concatenate([_flat(look[name][what]) for look in looks], axis=1)
            for name in looks[0]
        }
        for what in ("norms", "detected")
    )
    arrays = keyed(values, "norms") | keyed(marked, "detected")
    return Drawing(token_plots.norms(values, marked), arrays)


def draw_angles(study: Study, photo: Photo) -> Drawing:
    """Figure 2d: angles to ν_i by block."""
    return _angles(study, photo, "angles", r"$\nu_i$")


def draw_random(study: Study, photo: Photo) -> Drawing:
    """Figure 8: angles to a random direction by block."""
    return _angles(study, photo, "random", "a random direction")


def _angles(study: Study, photo: Photo, what: str, direction: str) -> Drawing:
    looks = _looks(study, photo)
    values = {model: _flat(look[what]) for model, look in looks.items()}
    marked = {model: _flat(look["detected"]) for model, look in looks.items()}
    figure = token_plots.angles(values, marked, direction=direction)
    return Drawing(figure, keyed(values, what) | keyed(marked, "detected"))


def measured_directions(study: Study, subject: Subject) -> Arrays:
    """The direction of the highest-norm tokens, block by block, over the photographs.

    Returns:
      "direction" [L, D], "spread" [L], "pairwise" [L, pairs] and "to_theory" [L], its
      angle to the first model's ν_i, in degrees.
    """
    looks = [study.cache(study.look(subject, photo)) for photo in study.photos]
    highest = np.stack([look["highest"] for look in looks], axis=1)[:, :, None]
    found = jax.device_get(_empirical(highest))
    nu = study.cache(study.directions())["directions"]
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


def draw_theory(study: Study) -> Drawing:
    """Figure 2: the measured direction against ν_i."""
    found = measured_directions(study, study.first)
    maps = study.cache(study.spectra(study.first))
    direction = found["direction"]
    key = jax.random.key(study.options.seed)
    random = tokens.random_directions(key, 1, direction.shape[1])
    layerwise = maps["directions"].astype(np.float32)
    shown = {name: x for name, x in found.items() if name != "direction"} | {
        "to_layerwise": np.asarray(_angle(direction, layerwise)),
        "to_random": np.asarray(tokens.angles(direction, random[0])),
    }
    return Drawing(token_plots.theory(**shown), {"direction": direction} | shown)


def draw_pca(study: Study, photo: Photo) -> Drawing:
    """Figures 1 and 3: PCA, model by model."""
    steps = {subject.name: study.look(subject, photo) for subject in study.subjects}
    if study.registers is not None:
        steps["with registers"] = study.seen(study.registers, photo)
    pictures = {name: study.cache(step)["pca"] for name, step in steps.items()}
    if len(pictures) == 1:
        pictures = {"PCA of tokens": next(iter(pictures.values()))}
    arrays = {"photograph": photo.pixels} | keyed(pictures, "pca")
    return Drawing(token_plots.pca(photo.pixels, pictures), arrays)


def draw_blocks(study: Study, photo: Photo) -> Drawing:
    """Figure 6: chosen blocks of the first model."""
    chosen = list(study.blocks)
    look = study.cache(study.look(study.first, photo))
    panels = study.cache(study.panels(photo))
    arrays = {
        "angles": look["angles"],
        "detected": study.detected(look),
        "blocks": np.array(chosen),
        "pca": panels["pca"],
        "targets": panels["targets"],
        "temperatures": np.array(TEMPERATURES),
    }
    figure = token_plots.blocks(
        _flat(arrays["angles"]),
        _flat(arrays["detected"]),
        chosen,
        pca=arrays["pca"],
        heat=arrays["angles"][chosen],
        detected=arrays["detected"][chosen],
        targets=dict(zip(TEMPERATURES, arrays["targets"].swapaxes(0, 1), strict=True)),
        mask_thr=study.options.mask_thr,
    )
    return Drawing(figure, arrays)


def draw_clamp(study: Study, photo: Photo) -> Drawing:
    """Figure 5: the first model clamped."""
    look = study.cache(study.look(study.first, photo))
    last = {"not clamped": {"pca": look["pca"], "norms": look["norms"][-1]}} | {
        f"γ = {gamma:g}": study.cache(study.clamped(gamma, photo))
        for gamma in study.options.gammas
    }
    pictures = {name: each["pca"] for name, each in last.items()}
    norms = {name: each["norms"].ravel() for name, each in last.items()}
    large = {
        name: np.ravel(defective.large_norms(each["norms"]))
        for name, each in last.items()
    }
    figure = token_plots.clamping(pictures, norms, large)
    return Drawing(figure, keyed(pictures, "pca") | keyed(norms, "norms"))


def draw_growth(study: Study, photo: Photo) -> Drawing:
    """Growth of the first model's tokens along the ν of the last block."""
    look = study.cache(study.look(study.first, photo))
    found = study.cache(study.growth(photo))
    norms = look["norms"][-1]
    mask, which = study.detected(look)[-1], "tokens detected in the last block"
    if not mask.any():
        mask = norms >= np.sort(norms.ravel())[-HIGHEST:][0]
        which = f"{HIGHEST} patch tokens of highest norm"
    # A direction has no sign: most of these tokens are to end up on its side.
    sign = -1.0 if np.median(found["end"][mask]) < 0 else 1.0
    parts = (found["attention"][:, mask], found["ffn"][:, mask], found["start"][mask])
    figure = token_plots.growth(*(sign * part for part in parts))
    words = {"tokens": f"{mask.sum()} {which}"}
    return Drawing(figure, found | {"tokens": mask}, words)
