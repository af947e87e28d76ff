"""plots/weight_plots.py: what is in a figure, not how it looks."""

import numpy as np

import figures
from sinder_jax.plots import weight_plots


def test_changes_share_their_scale_whatever_the_kernel():
    changes = {"a": np.zeros((figures.L, 3)), "b": np.full((figures.L, 3), -9.0)}
    one, two = weight_plots.changes(changes).axes
    assert one.get_ylim() == two.get_ylim()


def test_forecast_marks_the_block_only_if_there_is_one():
    gaps = {"model": np.linspace(1, 9, figures.L)}
    assert "defect appears" in figures.text_of(
        weight_plots.forecast(gaps, 3, ["mlp/w3"], [1.0])
    )
    sound = weight_plots.forecast(gaps, -1, [], [])
    assert "defect appears" not in figures.text_of(sound) and len(sound.axes) == 1
