"""plots/pictures.py: columns, shared scales and painted patches."""

import matplotlib
import numpy as np
import pytest
from matplotlib.image import AxesImage

import figures
from sinder_jax.analysis import defective
from sinder_jax.analysis.defective import TokenMaps
from sinder_jax.plots import pictures, style


def photograph(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    red, green = 255 * rows / height, 255 * columns / width
    return np.stack([red, green, 0 * red + 90], axis=-1).astype(np.uint8)


def token_maps(rows: int, columns: int, outliers=(), norm: float = 50.0):
    norms = np.full((rows, columns), norm, np.float32)
    mask = np.zeros((rows, columns), bool)
    for place in outliers:
        norms[place], mask[place] = 10 * norm, True
    pca = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    return TokenMaps(pca, norms, mask)


def before_now(photo, before, now):
    return pictures.token_rows([(photo, {"before": before, "now": now})])


def norm_images(figure):
    """The images of the third column, from above."""
    flat = [image for image in figure.findobj(AxesImage) if image.get_array().ndim == 2]
    return [image for image in flat if image.get_cmap().name == "viridis"]


@pytest.mark.parametrize(
    "height, width", [(224, 224), (518, 518), (518, 686), (112, 56)]
)
def test_before_and_now_stand_in_two_rows_on_one_scale(height, width):
    rows, columns = height // 14, width // 14
    before = token_maps(rows, columns, [(1, 1), (2, 2), (3, 1)])
    now = token_maps(rows, columns)
    figure = before_now(photograph(height, width), before, now)
    words = {"before", "now", "photograph", "PCA of tokens", "token norm", "outliers"}
    words |= {defective.describe(maps) for maps in (before, now)}
    assert words <= figures.text_of(figure)
    upper, lower = norm_images(figure)
    assert upper.get_clim() == lower.get_clim() == (0.0, 500.0)
    np.testing.assert_array_equal(upper.get_array(), before.norms)
    np.testing.assert_array_equal(lower.get_array(), now.norms)
    shown = [np.asarray(image.get_array()) for image in figure.findobj(AxesImage)]
    assert sum(np.array_equal(each, before.pca) for each in shown) == 2
    assert sum(each.shape == (height, width, 3) for each in shown) == 2


def test_every_panel_has_the_shape_of_the_photograph_and_loses_no_pixel():
    for height, width in [(224, 224), (518, 686), (896, 1204)]:
        maps = token_maps(height // 14, width // 14)
        figure = before_now(photograph(height, width), maps, maps)
        rgb = style.pixels(figure)
        boxes = [image.axes.get_window_extent() for image in figure.findobj(AxesImage)]
        scale = rgb.shape[1] / figure.bbox.width
        for box in boxes:
            assert box.width / box.height == pytest.approx(width / height, rel=1e-3)
            assert box.height * scale >= 0.9 * height
        assert len({round(box.width) for box in boxes}) == 1  # aligned
        assert 4 * width * 0.9 < rgb.shape[1] < 4 * max(width, 420) * 1.4


def test_photographs_have_scales_of_their_own_below_each_other():
    photo = photograph(224, 224)
    looks = [(photo, {"now": token_maps(16, 16, norm=norm)}) for norm in (50.0, 7.0)]
    figure = pictures.token_rows(looks)
    one, two = norm_images(figure)
    assert one.get_clim()[1] == 50 and two.get_clim()[1] == 7
    alone = pictures.token_rows(looks[:1])
    height, width, _ = style.pixels(alone).shape
    assert style.pixels(figure).shape == (2 * height, width, 3)


def test_outliers_are_painted_and_the_rest_is_faded():
    photo = photograph(224, 224)
    mask = np.zeros((16, 16), bool)
    mask[3, 7] = True
    figure = style.new_figure(2.24, 2.24)
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    pictures.outliers(ax, photo, mask)
    rgb = style.pixels(figure)
    side = rgb.shape[0] / 16
    center = rgb[round(3.5 * side), round(7.5 * side)]
    np.testing.assert_array_equal(center, [213, 94, 0])
    painted = (rgb == np.uint8([213, 94, 0])).all(axis=2).mean() * 256
    assert 0.7 < painted < 0.8  # 0.86 squared: a seam of photograph around the patch
    rest = rgb[: round(2.9 * side)]
    assert np.ptp(rest, axis=2).max() <= 1 and rest.min() >= 140


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(
        ValueError, match="2 x 2 patches does not fit .* 28 x 42 pixels"
    ):
        ax = style.new_figure(1.0, 1.0).subplots()
        pictures.outliers(ax, photograph(28, 42), np.zeros((2, 2), bool))


def test_norms_that_are_not_finite_are_gray_and_zero_norms_are_drawn():
    maps = token_maps(16, 16)
    maps.norms[2, 2] = np.nan
    (shown,) = norm_images(pictures.token_rows([(photograph(224, 224), {"": maps})]))
    assert shown.get_clim() == (0.0, 50.0)
    gray = matplotlib.colors.to_rgba("silver")
    np.testing.assert_allclose(shown.to_rgba(shown.get_array())[2, 2], gray)
    zero = token_maps(16, 16, norm=0.0)._replace(norms=np.full((16, 16), np.nan))
    style.pixels(pictures.token_rows([(photograph(224, 224), {"": zero})]))
