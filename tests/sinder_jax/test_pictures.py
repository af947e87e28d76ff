"""pictures.py: colors, overlays, layout, and files that are whole or not there."""

import os
import stat

import numpy as np
import pytest
from PIL import Image

from sinder_jax import pictures

WHITE = (255, 255, 255)


def photograph(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    red, green = 255 * rows / height, 255 * columns / width
    return np.stack([red, green, 0 * red + 90], axis=-1).astype(np.uint8)


def plain(height: int, width: int, color) -> np.ndarray:
    return np.broadcast_to(np.uint8(color), (height, width, 3)).copy()


def token_maps(rows: int, columns: int, outliers=(), norm: float = 50.0):
    norms = np.full((rows, columns), norm, np.float32)
    mask = np.zeros((rows, columns), bool)
    for place in outliers:
        norms[place], mask[place] = 10 * norm, True
    pca = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    return pictures.TokenMaps(pca, norms, mask)


# --- Heat map and its bar -------------------------------------------------------------


def test_heat_map_runs_from_dark_blue_to_yellow():
    colors = pictures.heat_map(np.array([[-1.0, 2.0, 6.0, 10.0, 99.0]]), 2.0, 10.0)
    assert colors.shape == (1, 5, 3) and colors.dtype == np.uint8
    # The ends and the middle of viridis; what lies outside is clipped.
    expected = [
        (68, 1, 84),
        (68, 1, 84),
        (33, 145, 140),
        (253, 231, 37),
        (253, 231, 37),
    ]
    np.testing.assert_array_equal(colors[0], expected)


def test_heat_map_gets_lighter_evenly():
    """Perceptual, and readable in gray: CIE lightness is a straight line."""
    ramp = np.linspace(0, 1, 256)[None]
    linear = (pictures.heat_map(ramp, 0.0, 1.0)[0] / 255.0) ** 2.2
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(np.maximum(luminance, 0.0089)) - 16
    assert (np.diff(lightness) > -0.6).all()  # 8-bit steps of color
    straight = np.linspace(lightness[0], lightness[-1], 256)
    assert np.abs(lightness - straight).max() < 5  # of a range of 77


def test_values_that_are_not_finite_are_gray():
    colors = pictures.heat_map(np.array([[np.nan, np.inf, 1.0]]), 0.0, 1.0)[0]
    np.testing.assert_array_equal(colors[:2], [(190, 190, 190)] * 2)
    np.testing.assert_array_equal(colors[2], (253, 231, 37))


def test_a_flat_heat_map_divides_by_nothing():
    colors = pictures.heat_map(np.full((2, 2), 7.0), 7.0, 7.0)
    np.testing.assert_array_equal(colors, plain(2, 2, (68, 1, 84)))
    assert pictures.color_bar(0.0, 0.0, 100).shape[0] == 100


def test_color_bar_shows_the_map_with_numbers_beside_it():
    bar = pictures.color_bar(0.0, 100.0, 300, font_size=20)
    assert bar.shape[0] == 300
    ramp = np.linspace(100, 0, 300)[:, None]
    np.testing.assert_array_equal(
        bar[:, :20], pictures.heat_map(ramp, 0.0, 100.0).repeat(20, axis=1)
    )
    numbers = bar[:, 28:].min(axis=(1, 2)) < 128
    assert numbers[:20].any() and numbers[-20:].any()  # 100 at the top, 0 below
    assert 40 < numbers.sum() < 200


@pytest.mark.parametrize(
    "vmin, vmax, expected",
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (0.0, 232.0, [0, 50, 100, 150, 200]),
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 3.0, [-3, -2, -1, 0, 1, 2, 3]),
        (0.0013, 0.0042, [0.0015, 0.002, 0.0025, 0.003, 0.0035, 0.004]),
        (0.0, 12_345.0, [0, 5000, 10_000]),
        (5.0, 5.0, [5]),
    ],
)
def test_ticks_are_round_numbers(vmin, vmax, expected):
    assert pictures._ticks(vmin, vmax) == pytest.approx(expected)


# --- Overlay and enlargement ----------------------------------------------------------


def test_overlay_paints_the_masked_patches_and_fades_the_rest():
    photo = photograph(28, 42)
    mask = np.zeros((2, 3), bool)
    mask[1, 2] = True
    overlay = pictures.mask_overlay(photo, mask)
    np.testing.assert_array_equal(overlay[15:27, 29:41], plain(12, 12, (213, 94, 0)))
    rest = np.ones((28, 42), bool)
    rest[15:27, 29:41] = False  # a pixel of seam around the painted patch
    faded = overlay[rest]
    assert (faded.max(1) == faded.min(1)).all() and faded.min() >= 140
    no_outlier = pictures.mask_overlay(photo, np.zeros((2, 3), bool))
    np.testing.assert_array_equal(no_outlier[rest], faded)


def test_overlay_refuses_a_mask_of_another_grid():
    with pytest.raises(
        ValueError, match="2 x 2 patches does not fit .* 28 x 42 pixels"
    ):
        pictures.mask_overlay(photograph(28, 42), np.zeros((2, 2), bool))


def test_enlarge_repeats_patches_without_smoothing():
    patches = token_maps(2, 3).pca
    large = pictures.enlarge(patches, 14)
    assert large.shape == (28, 42, 3)
    for row in range(2):
        for column in range(3):
            square = large[14 * row :, 14 * column :][:14, :14]
            np.testing.assert_array_equal(square, plain(14, 14, patches[row, column]))


# --- Composition ----------------------------------------------------------------------


def test_row_and_stack_place_images_on_white():
    red, blue = plain(10, 20, (255, 0, 0)), plain(30, 5, (0, 0, 255))
    side = pictures.row([red, blue], gap=4)
    assert side.shape == (30, 29, 3)
    np.testing.assert_array_equal(side[:10, :20], red)
    np.testing.assert_array_equal(side[:, 24:], blue)
    np.testing.assert_array_equal(side[10:, :24], plain(20, 24, WHITE))
    np.testing.assert_array_equal(side[:, 20:24], plain(30, 4, WHITE))
    below = pictures.stack([red, blue], gap=4)
    assert below.shape == (44, 20, 3)
    np.testing.assert_array_equal(below[:10], red)
    np.testing.assert_array_equal(below[14:, :5], blue)
    np.testing.assert_array_equal(below[10:14], plain(4, 20, WHITE))


def test_labels_stand_above_columns_and_left_of_rows():
    gray = plain(60, 200, (120, 120, 120))
    above = pictures.row([gray, gray], ["one", ""], gap=10, font_size=20)
    extra = above.shape[0] - 60
    assert 20 <= extra <= 40 and above.shape[1] == 410
    np.testing.assert_array_equal(above[extra:, :200], gray)
    inked = np.nonzero((above[:extra] < 100).all(axis=2))[1]
    assert abs(inked.mean() - 100) < 5 and inked.max() < 200  # centered over the first
    left = pictures.stack([gray, gray], ["one", "two\nmore"], gap=10, font_size=20)
    np.testing.assert_array_equal(left[:60, -200:], gray)
    assert left.shape[0] == 130 and (left[:60, :-206] < 100).any()


def test_a_label_longer_than_its_image_is_not_cut():
    label = "a label that is much longer than its image"
    picture = pictures.row([plain(20, 10, (0, 0, 0))], [label], font_size=20)
    assert picture.shape[1] > 200
    header = picture[:26]
    assert (header[:, 0] == 255).all() or (header[:, -1] == 255).all()


def test_labels_need_no_glyph_the_font_lacks():
    """Pillow's own font draws a box for what it does not have, such as ×."""
    maps = token_maps(4, 4, [(1, 1)])
    texts = ["photograph", "PCA of tokens", "token norm", "outliers", "before", "now"]
    assert all(text.isascii() for text in [*texts, pictures.caption(maps)])


# --- Figures --------------------------------------------------------------------------


def find(figure: np.ndarray, color) -> int:
    return int((figure == np.uint8(color)).all(axis=2).sum())


@pytest.mark.parametrize(
    "height, width", [(224, 224), (518, 518), (518, 686), (112, 56)]
)
def test_before_after_shows_both_rows_on_one_scale(height, width):
    rows, columns = height // 14, width // 14
    before = token_maps(rows, columns, [(1, 1), (2, 2), (3, 1)])
    after = token_maps(rows, columns)
    figure = pictures.before_after(photograph(height, width), before, after)
    assert figure.dtype == np.uint8 and figure.shape[2] == 3
    zoom = -(-400 // min(height, width))
    assert figure.shape[0] > 2 * height * zoom
    assert figure.shape[1] > 4 * width * zoom

    patch = (14 * zoom) ** 2
    seamless = (14 * zoom - 2 * zoom) ** 2
    assert find(figure, (213, 94, 0)) == 3 * seamless  # outliers only before
    low = pictures.heat_map(np.array([[50.0]]), 0.0, 500.0)[0, 0]
    # One scale: a norm of 50 has one color in both rows, and only `before` has yellow.
    assert find(figure, low) >= (2 * rows * columns - 3) * patch
    assert 3 * patch <= find(figure, (253, 231, 37)) < 4 * patch
    margin = np.concatenate([figure[:4].ravel(), figure[-4:].ravel()])
    assert (margin == 255).all()


def test_small_photographs_are_enlarged_and_large_ones_kept():
    small = pictures.before_after(photograph(112, 112), *[token_maps(8, 8)] * 2)
    large = pictures.before_after(photograph(896, 896), *[token_maps(64, 64)] * 2)
    assert small.shape[0] > 2 * 400
    assert 2 * 896 < large.shape[0] < 2 * 896 + 200


def test_a_figure_of_one_model_has_one_row():
    maps = token_maps(16, 16, [(3, 4)])
    one = pictures.token_figure(photograph(224, 224), {"model": maps})
    two = pictures.before_after(photograph(224, 224), maps, maps)
    assert one.shape[1] == two.shape[1]
    assert one.shape[0] < 0.6 * two.shape[0]


def test_norms_that_are_not_finite_can_still_be_drawn():
    maps = token_maps(16, 16)
    maps.norms[2, 2] = np.nan
    black = plain(224, 224, (0, 0, 0))  # fades to 140, another gray
    figure = pictures.token_figure(black, {"model": maps})
    # A few edges of letters have that gray too.
    assert 28**2 <= find(figure, (190, 190, 190)) < 1.1 * 28**2


def test_caption_counts_outliers_and_compares_norms():
    maps = token_maps(8, 8, [(1, 1), (2, 2)])
    assert pictures.caption(maps) == "2 outliers, max norm 10.0 x median"
    maps = token_maps(8, 8, [(1, 1)])
    assert pictures.caption(maps).startswith("1 outlier, ")
    assert pictures.caption(token_maps(8, 8)) == "0 outliers, max norm 1.0 x median"


# --- Files ----------------------------------------------------------------------------


def test_saved_png_gives_the_array_back(tmp_path):
    image = photograph(20, 30)
    pictures.save_png(tmp_path / "a.png", image)
    pictures.save_png(str(tmp_path / "a.png"), image[::-1])  # replaced, no error
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.format == "PNG"
        np.testing.assert_array_equal(np.asarray(saved), image[::-1])
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_saved_png_is_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    pictures.save_png(tmp_path / "a.png", photograph(2, 2))
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.png")
    ]
    assert modes[0] == modes[1]


def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    pictures.save_png(tmp_path / "a.png", photograph(20, 30))
    content = (tmp_path / "a.png").read_bytes()

    def full_disk(self, file, **options):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pictures.save_png(tmp_path / "a.png", photograph(20, 30)[::-1])
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == content


def test_saving_into_a_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        pictures.save_png(tmp_path / "nowhere" / "a.png", photograph(2, 2))
