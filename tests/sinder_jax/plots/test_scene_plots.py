import numpy as np
from matplotlib.image import AxesImage

import figures
from sinder_jax.plots import scene_plots


def shown(height, width, first=0):
    rng = np.random.default_rng(height)
    photo = rng.integers(0, 256, (height, width, 3), np.uint8)
    prediction = rng.integers(first, first + 3, (height, width), np.uint8)
    mask = prediction.copy()
    mask[0] = 255
    return photo, prediction, mask


def test_each_photograph_has_its_prediction_and_its_mask_beside_it():
    rows = [shown(20, 30), shown(40, 24)]
    figure = scene_plots.scenes(rows, ["sky", "sea", "land", "nowhere"])
    images = [image.get_array() for image in figure.findobj(AxesImage)]
    want = [
        each
        for photo, *classes in rows
        for each in (photo, *map(scene_plots.colored, classes))
    ]
    assert len(images) == len(want)
    for got, expected in zip(images, want, strict=True):
        assert np.array_equal(got, expected)
    words = figures.text_of(figure)
    assert {"photograph", "prediction", "truth", "sky", "sea", "land"} <= words
    assert "nowhere" not in words


def test_classes_without_names_are_numbered():
    assert {"7", "8", "9"} <= figures.text_of(scene_plots.scenes([shown(9, 9, 7)]))


def test_every_class_has_a_color_of_its_own():
    colors = scene_plots.colored(np.arange(256, dtype=np.uint8)[None])[0]
    assert len(np.unique(colors[:60], axis=0)) == 60
    assert colors[255].tolist() == [255, 255, 255]
    assert not (colors[:255] == 255).all(axis=-1).any()


def test_a_data_set_is_drawn_in_its_own_colors():
    photo, _, mask = shown(6, 8)
    prediction = np.full((6, 8), 1, np.uint8)
    for palette, ignored in (
        ([(0, 0, 0), (1, 2, 3)], 255),
        ([(255, 255, 255), (1, 2, 3)], 128),  # where a class is white
    ):
        colored = scene_plots.colored(mask, palette)
        assert (colored[0] == ignored).all()
        assert (colored[mask == 0] == palette[0]).all()
        assert (colored[mask == 1] == (1, 2, 3)).all()
        assert np.array_equal(colored[mask == 2], scene_plots.colored(mask)[mask == 2])
        figure = scene_plots.scenes([(photo, prediction, mask)], (), palette)
        images = [image.get_array() for image in figure.findobj(AxesImage)]
        assert (images[1] == (1, 2, 3)).all() and np.array_equal(images[2], colored)
        (legend,) = figure.legends
        shades = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
        np.testing.assert_allclose(shades[1], np.array([1, 2, 3]) / 255)
        edge = legend.get_patches()[0].get_edgecolor()[:3]
        assert max(edge) < 0.8  # a white patch can be seen on white paper
