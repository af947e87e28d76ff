"""plots/style.py: every figure's size, text and files."""

import io
import re
import xml.etree.ElementTree
import zlib

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import figures
from sinder_jax.plots import pictures, style, token_plots, weight_plots

# --- Every figure ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list(figures.drawn()))
def test_figure_is_drawn_with_units_and_leaves_global_settings_alone(name):
    before = dict(matplotlib.rcParams)
    figure = figures.drawn()[name]()
    png = style.encode(figure, "png", dpi=50)
    assert dict(matplotlib.rcParams) == before
    assert png.startswith(b"\x89PNG")
    width = figure.get_size_inches()[0]
    if name != "token_rows":  # for screens, as large as its photographs
        assert style.COLUMN - 0.01 <= width <= style.PAGE + 0.01
    sizes = {x.get_fontsize() for x in figure.findobj(matplotlib.text.Text)}
    assert min(sizes) >= 7  # points, at the size it is printed
    words = " ".join(figures.text_of(figure))
    if name not in ("clamping", "pca", "token_rows", "eigenvalues"):
        assert "block, from 0" in words
    if name in ("angles", "theory", "blocks"):
        assert "degrees" in words


def test_the_table_of_figures_is_complete():
    public = {
        name
        for module in (pictures, token_plots, weight_plots)
        for name, each in vars(module).items()
        if getattr(each, "__module__", None) == module.__name__
        and not name.startswith("_")
        and each.__annotations__.get("return") is Figure
    }
    assert public == set(figures.drawn())


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_figure_gives_the_same_bytes(kind):
    one, two = (
        style.encode(token_plots.angles({"": figures.ANGLES}), kind) for _ in range(2)
    )
    assert one == two


def test_svg_is_well_formed_and_refers_to_nothing_outside():
    svg = style.encode(token_plots.norms({"a": figures.NORMS}), "svg").decode()
    xml.etree.ElementTree.fromstring(svg)
    used = re.findall(r'href="([^"]*)"', svg)
    assert used and all(x.startswith(("#", "data:")) for x in used)


def test_pdf_embeds_its_letters_as_truetype():
    """Type 3 fonts are refused by many journals."""
    pdf = style.encode(token_plots.angles({"": figures.ANGLES}), "pdf")
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    inside = pdf + b"".join(
        zlib.decompressobj().decompress(x) for x in streams if x[:1] == b"x"
    )
    assert b"/FontFile2" in inside and b"/Type3" not in inside


@pytest.mark.parametrize("name", ["pca", "token_rows"])
def test_pixels_are_those_of_the_png(name):
    figure = figures.drawn()[name]()
    with Image.open(io.BytesIO(style.encode(figure, "png"))) as png:
        expected = np.asarray(png.convert("RGB"))
    rgb = style.pixels(figure)
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, expected)
