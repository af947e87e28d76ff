"""One small figure of every function of `sinder_jax.plots`; the text in a figure."""

from collections.abc import Callable

import matplotlib.text
import numpy as np
from matplotlib.figure import Figure

from sinder_jax.analysis.defective import TokenMaps
from sinder_jax.plots import pictures, token_plots, weight_plots

L, H, W = 6, 4, 5
N = H * W
RNG = np.random.default_rng(0)
NORMS = np.exp(RNG.normal(2, 0.3, (L, N)))
ANGLES = RNG.uniform(0, 90, (L, N))
MARKS = np.zeros((L, N), bool)
MARKS[3:, [2, 7]] = True
PICTURES = RNG.integers(0, 256, (4, H, W, 3)).astype(np.uint8)
PHOTO = PICTURES[0].repeat(14, 0).repeat(14, 1)


def drawn() -> dict[str, Callable[[], Figure]]:
    """One call of every function that makes a figure, by name."""
    maps = TokenMaps(PICTURES[1], NORMS[0].reshape(H, W), MARKS[5].reshape(H, W))
    lines = RNG.normal(size=(4, L))
    return {
        "norms": lambda: token_plots.norms(
            {"a": NORMS, "b": NORMS}, {"a": MARKS, "b": MARKS}
        ),
        "angles": lambda: token_plots.angles({"": ANGLES}),
        "theory": lambda: token_plots.theory(
            lines[0], lines[1], np.abs(RNG.normal(size=(L, 3))), lines[2], lines[3]
        ),
        "clamping": lambda: token_plots.clamping(
            {"original": PICTURES[0], "γ = 2": PICTURES[1]},
            {"original": NORMS[0], "γ = 2": NORMS[1]},
            {"original": MARKS[0], "γ = 2": MARKS[5]},
        ),
        "blocks": lambda: token_plots.blocks(
            ANGLES,
            MARKS,
            [1, 4],
            pca=PICTURES[:2],
            heat=ANGLES[[1, 4]].reshape(2, H, W),
            detected=MARKS[[1, 4]].reshape(2, H, W),
            targets={0.1: PICTURES[:2]},
            mask_thr=4.0,
        ),
        "pca": lambda: token_plots.pca(PHOTO, {"before": PICTURES[1]}),
        "token_rows": lambda: pictures.token_rows([(PHOTO, {"model": maps})]),
        "growth": lambda: token_plots.growth(
            RNG.normal(size=(L, 2)), RNG.normal(size=(L, 2)), np.ones(2)
        ),
        "changes": lambda: weight_plots.changes({"mlp/w3": RNG.normal(size=(L, 3))}),
        "forecast": lambda: weight_plots.forecast(
            {"a": 1 + lines[0] ** 2}, 3, ["x"], [0.9]
        ),
        "spectra": lambda: weight_plots.spectra(
            {"attn/v": 1 + lines[0] ** 2}, 1 + lines[1] ** 2, np.ones(L), np.zeros(L)
        ),
        "eigenvalues": lambda: weight_plots.eigenvalues(
            RNG.normal(size=(L, 8)) + 1j * RNG.normal(size=(L, 8)), [0, 5]
        ),
    }


def text_of(figure: Figure) -> set[str]:
    """Whatever is written in a figure."""
    return {x.get_text() for x in figure.findobj(matplotlib.text.Text)} - {""}
