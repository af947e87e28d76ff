"""plots/token_plots.py: what is in a figure, not how it looks."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import LineCollection

import figures
from sinder_jax.plots import style, token_plots

NOTHING = np.zeros_like(figures.MARKS)
RNG = np.random.default_rng(0)


# --- Violins --------------------------------------------------------------------------


def axes():
    return style.new_figure(3.0, 2.0).subplots()


def body(ax, block):
    """Corners of a violin."""
    return ax.collections[block].get_paths()[0].vertices


def test_violin_spans_its_values_and_is_widest_where_most_are():
    values = np.concatenate([RNG.normal(30, 1, 900), RNG.normal(60, 1, 100)])[None]
    corners = body(token_plots.violins(axes(), values), 0)
    x, y = corners.T
    assert y.min() == pytest.approx(values.min(), abs=0.4)  # one bin of 120
    assert y.max() == pytest.approx(values.max(), abs=0.4)
    assert y[np.abs(x).argmax()] == pytest.approx(30, abs=1)
    assert np.abs(x).max() == pytest.approx(0.42)
    at_60 = np.abs(x[np.abs(y - 60) < 1]).max()
    # A ninth of the tokens, spread by the common bandwidth as the others are.
    assert at_60 == pytest.approx(0.42 / 9, rel=0.1)


def test_marked_tokens_are_dots_and_not_in_the_violin():
    values = RNG.normal(80, 1, (2, 50))
    values[1, 3] = 10
    marked = values < 20
    ax = token_plots.violins(axes(), values, marked)
    assert body(ax, 1)[:, 1].min() > 70
    dots = ax.lines[-1]
    assert (dots.get_xdata(), dots.get_ydata()) == (1, 10)
    unmarked = token_plots.violins(axes(), values)
    assert body(unmarked, 1)[:, 1].min() < 11


def test_medians_are_of_the_violins():
    values = RNG.normal(50, 5, (3, 99))
    ax = token_plots.violins(axes(), values)
    (dashes,) = [x for x in ax.collections if isinstance(x, LineCollection)]
    drawn = [segment[0][1] for segment in dashes.get_segments()]
    np.testing.assert_allclose(drawn, np.median(values, axis=1))


def test_logarithmic_violin_has_the_shape_of_the_logarithms():
    values = 10 ** RNG.normal(1, 0.2, (1, 500))
    log = body(token_plots.violins(axes(), values, log=True), 0)
    linear = body(token_plots.violins(axes(), np.log10(values)), 0)
    np.testing.assert_allclose(log[:, 0], linear[:, 0])
    np.testing.assert_allclose(np.log10(log[:, 1]), linear[:, 1])


@pytest.mark.parametrize("log", [False, True])
def test_equal_values_one_value_and_none_are_drawn(log):
    values = np.full((2, 3), 7.0)
    marked = np.array([[False, False, False], [True, True, True]])
    style.encode(
        token_plots.violins(axes(), values, marked, log=log).figure, "png", dpi=40
    )
    style.encode(
        token_plots.violins(axes(), values[:, :1], log=log).figure, "png", dpi=40
    )


# --- What is compared -----------------------------------------------------------------


def test_models_that_are_compared_share_their_scale():
    figure = token_plots.norms({"before": figures.NORMS * 100, "after": figures.NORMS})
    one, two = figure.axes
    assert one.get_ylim() == two.get_ylim()
    assert one.get_yscale() == "log"
    assert {"before", "after"} <= figures.text_of(figure)
    one, two = token_plots.angles(
        {"before": figures.ANGLES, "after": figures.ANGLES / 9}
    ).axes
    assert one.get_ylim() == two.get_ylim() == (-2, 92)


def test_clamped_norms_share_their_scale():
    figure = figures.drawn()["clamping"]()
    below = [ax for ax in figure.axes if ax.get_yscale() == "log"]
    assert len(below) == 2 and below[0].get_ylim() == below[1].get_ylim()


def test_heat_maps_share_one_scale_that_is_dark_for_small_angles():
    figure = figures.drawn()["blocks"]()
    shown = [
        image
        for image in figure.findobj(matplotlib.image.AxesImage)
        if image.get_cmap().name == "cividis"
    ]
    assert len(shown) == 2
    assert shown[0].get_clim() == shown[1].get_clim()
    low, high = shown[0].get_clim()
    assert high == 90 and low <= figures.ANGLES[[1, 4]].min()
    dark, bright = shown[0].get_cmap()([0.0, 1.0])[:, :3].sum(axis=1)
    assert dark < 0.6 < bright


def test_legend_of_the_dots_is_there_only_with_dots():
    with_dots = figures.text_of(
        token_plots.angles({"": figures.ANGLES}, {"": figures.MARKS})
    )
    without = figures.text_of(token_plots.angles({"": figures.ANGLES}, {"": NOTHING}))
    assert with_dots - without == {r"detected along $\nu_i$"}
