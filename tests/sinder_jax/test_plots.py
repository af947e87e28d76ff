"""sinder_jax/plots.py: what is in a figure, not how it looks."""

import builtins
import re
import xml.etree.ElementTree
import zlib

import matplotlib
import numpy as np
import pytest

from sinder_jax import plots

L, H, W = 6, 4, 5
N = H * W
RNG = np.random.default_rng(0)
NORMS = np.exp(RNG.normal(2, 0.3, (L, N)))
ANGLES = RNG.uniform(0, 90, (L, N))
MARKS = np.zeros((L, N), bool)
MARKS[3:, [2, 7]] = True
PICTURES = RNG.integers(0, 256, (4, H, W, 3)).astype(np.uint8)
NOTHING = np.zeros((L, N), bool)


def all_figures():
    """One call of every function that makes a figure, by name."""
    lines = RNG.normal(size=(4, L))
    return {
        "norms": lambda: plots.norms(
            {"a": NORMS, "b": NORMS}, {"a": MARKS, "b": MARKS}
        ),
        "angles": lambda: plots.angles({"": ANGLES}),
        "theory": lambda: plots.theory(
            lines[0], lines[1], np.abs(RNG.normal(size=(L, 3))), lines[2], lines[3]
        ),
        "clamping": lambda: plots.clamping(
            {"original": PICTURES[0], "γ = 2": PICTURES[1]},
            {"original": NORMS[0], "γ = 2": NORMS[1]},
        ),
        "blocks": lambda: plots.blocks(
            ANGLES,
            MARKS,
            [1, 4],
            pca=PICTURES[:2],
            heat=ANGLES[[1, 4]].reshape(2, H, W),
            detected=MARKS[[1, 4]].reshape(2, H, W),
            targets={0.1: PICTURES[:2]},
            mask_thr=4.0,
        ),
        "pca": lambda: plots.pca(
            PICTURES[0].repeat(14, 0).repeat(14, 1), {"before": PICTURES[1]}
        ),
        "growth": lambda: plots.growth(
            RNG.normal(size=(L, 2)), RNG.normal(size=(L, 2)), np.ones(2)
        ),
        "changes": lambda: plots.changes({"mlp/w3": RNG.normal(size=(L, 3))}),
        "forecast": lambda: plots.forecast({"a": 1 + lines[0] ** 2}, 3, ["x"], [0.9]),
        "spectra": lambda: plots.spectra(
            {"attn/v": 1 + lines[0] ** 2}, 1 + lines[1] ** 2, np.ones(L), np.zeros(L)
        ),
        "eigenvalues": lambda: plots.eigenvalues(
            RNG.normal(size=(L, 8)) + 1j * RNG.normal(size=(L, 8)), [0, 5]
        ),
    }


def text_of(figure):
    """Whatever is written in a figure."""
    return {x.get_text() for x in figure.findobj(matplotlib.text.Text)} - {""}


# --- Every figure ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list(all_figures()))
def test_figure_is_drawn_with_units_and_leaves_global_settings_alone(name):
    before = dict(matplotlib.rcParams)
    figure = all_figures()[name]()
    png = plots.encode(figure, "png", dpi=50)
    assert dict(matplotlib.rcParams) == before
    assert png.startswith(b"\x89PNG")
    width = figure.get_size_inches()[0]
    assert plots.COLUMN - 0.01 <= width <= plots.PAGE + 0.01
    sizes = {x.get_fontsize() for x in figure.findobj(matplotlib.text.Text)}
    assert min(sizes) >= 7  # points, at the size it is printed
    words = " ".join(text_of(figure))
    if name not in ("clamping", "pca", "eigenvalues"):
        assert "block, from 0" in words
    if name in ("angles", "theory", "blocks"):
        assert "degrees" in words


def test_the_table_of_figures_is_complete():
    public = {
        name
        for name, each in vars(plots).items()
        if hasattr(each, "__wrapped__")
        and not name.startswith("_")
        # jaxtyping wraps the others too
        and each.__annotations__.get("return") is plots.Figure
    }
    assert public - {"violins", "picture"} == set(all_figures())


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_figure_gives_the_same_bytes(kind):
    one, two = (plots.encode(plots.angles({"": ANGLES}), kind) for _ in range(2))
    assert one == two


def test_svg_is_well_formed_and_refers_to_nothing_outside():
    svg = plots.encode(plots.norms({"a": NORMS}), "svg").decode()
    xml.etree.ElementTree.fromstring(svg)
    used = re.findall(r'href="([^"]*)"', svg)
    assert used and all(x.startswith(("#", "data:")) for x in used)


def test_pdf_embeds_its_letters_as_truetype():
    """Type 3 fonts are refused by many journals."""
    pdf = plots.encode(plots.angles({"": ANGLES}), "pdf")
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    inside = pdf + b"".join(
        zlib.decompressobj().decompress(x) for x in streams if x[:1] == b"x"
    )
    assert b"/FontFile2" in inside and b"/Type3" not in inside


def test_without_matplotlib_the_line_for_pip_is_said(monkeypatch):
    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'sinder_jax\[plots\]'"):
        plots.angles({"": ANGLES})


# --- Violins --------------------------------------------------------------------------


def axes():
    return plots._figure(3.0, 2.0).subplots()


def body(ax, block):
    """Corners of a violin."""
    return ax.collections[0].get_paths()[block].vertices


def test_violin_spans_its_values_and_is_widest_where_most_are():
    values = np.concatenate([RNG.normal(30, 1, 900), RNG.normal(60, 1, 100)])[None]
    corners = body(plots.violins(axes(), values), 0)
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
    ax = plots.violins(axes(), values, marked)
    assert body(ax, 1)[:, 1].min() > 70
    dots = ax.lines[-1]
    assert (dots.get_xdata(), dots.get_ydata()) == (1, 10)
    assert body(plots.violins(axes(), values), 1)[:, 1].min() < 11  # not marked: inside


def test_medians_are_of_the_violins():
    values = RNG.normal(50, 5, (3, 99))
    ax = plots.violins(axes(), values)
    drawn = [segment[0][1] for segment in ax.collections[1].get_segments()]
    np.testing.assert_allclose(drawn, np.median(values, axis=1))


def test_logarithmic_violin_has_the_shape_of_the_logarithms():
    values = 10 ** RNG.normal(1, 0.2, (1, 500))
    log = body(plots.violins(axes(), values, log=True), 0)
    linear = body(plots.violins(axes(), np.log10(values)), 0)
    np.testing.assert_allclose(log[:, 0], linear[:, 0])
    np.testing.assert_allclose(np.log10(log[:, 1]), linear[:, 1])


@pytest.mark.parametrize("log", [False, True])
def test_equal_values_one_value_and_none_are_drawn(log):
    values = np.full((2, 3), 7.0)
    marked = np.array([[False, False, False], [True, True, True]])
    plots.encode(plots.violins(axes(), values, marked, log=log).figure, "png", dpi=40)
    plots.encode(plots.violins(axes(), values[:, :1], log=log).figure, "png", dpi=40)


# --- What is compared -----------------------------------------------------------------


def test_models_that_are_compared_share_their_scale():
    figure = plots.norms({"before": NORMS * 100, "after": NORMS})
    one, two = figure.axes
    assert one.get_ylim() == two.get_ylim()
    assert one.get_yscale() == "log"
    assert {"before", "after"} <= text_of(figure)
    one, two = plots.angles({"before": ANGLES, "after": ANGLES / 9}).axes
    assert one.get_ylim() == two.get_ylim() == (-2, 92)


def test_clamped_norms_share_their_scale():
    figure = all_figures()["clamping"]()
    below = [ax for ax in figure.axes if ax.get_yscale() == "log"]
    assert len(below) == 2 and below[0].get_ylim() == below[1].get_ylim()


def test_changes_share_their_scale_whatever_the_kernel():
    changes = {"a": np.zeros((L, 3)), "b": np.full((L, 3), -9.0)}
    one, two = plots.changes(changes).axes
    assert one.get_ylim() == two.get_ylim()


def test_heat_maps_share_one_scale_that_is_dark_for_small_angles():
    figure = all_figures()["blocks"]()
    shown = [
        image
        for image in figure.findobj(matplotlib.image.AxesImage)
        if image.get_cmap().name == "cividis"
    ]
    assert len(shown) == 2
    assert shown[0].get_clim() == shown[1].get_clim()
    low, high = shown[0].get_clim()
    assert high == 90 and low <= ANGLES[[1, 4]].min()
    dark, bright = shown[0].get_cmap()([0.0, 1.0])[:, :3].sum(axis=1)
    assert dark < 0.6 < bright


def test_legend_of_the_dots_is_there_only_with_dots():
    with_dots = text_of(plots.angles({"": ANGLES}, {"": MARKS}))
    without = text_of(plots.angles({"": ANGLES}, {"": NOTHING}))
    assert with_dots - without == {r"detected along $\nu_i$"}


def test_forecast_marks_the_block_only_if_there_is_one():
    gaps = {"model": np.linspace(1, 9, L)}
    assert "defect appears" in text_of(plots.forecast(gaps, 3, ["mlp/w3"], [1.0]))
    sound = plots.forecast(gaps, -1, [], [])
    assert "defect appears" not in text_of(sound) and len(sound.axes) == 1
