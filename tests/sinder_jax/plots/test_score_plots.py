from sinder_jax.plots import score_plots


def test_every_metric_has_a_panel_and_every_model_a_point():
    points = {
        "a": {"top1": (80.0, (78.0, 82.0)), "top5": (95.0, None)},
        "some/$very$/" + "long" * 20: {
            "top1": (81.0, (79.0, 83.0)),
            "top5": (96.0, None),
        },
    }
    figure = score_plots.scores(points, "%")
    assert [ax.get_xlabel() for ax in figure.axes] == ["top1 (%)", "top5 (%)"]
    first, second = figure.axes
    assert [list(line.get_xdata()) for line in first.lines] == [
        [78.0, 82.0],
        [80.0],
        [79.0, 83.0],
        [81.0],
    ]
    assert [list(line.get_xdata()) for line in second.lines] == [[95.0], [96.0]]
    name = first.get_yticklabels()[1].get_text()
    assert len(name) == score_plots.MOST_NAME and name.startswith("…")


def test_one_metric_over_another_with_both_intervals():
    points = {
        "a": {"x": (0.1, (0.05, 0.2)), "y": (0.9, (0.8, 1.0))},
        "b": {"x": (0.3, None), "y": (0.5, None)},
    }
    (ax,) = score_plots.versus(points, [("x", "y")]).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")
    drawn = [(list(x.get_xdata()), list(x.get_ydata())) for x in ax.lines]
    assert drawn == [
        ([0.05, 0.2], [0.9, 0.9]),
        ([0.1, 0.1], [0.8, 1.0]),
        ([0.1], [0.9]),
        ([0.3], [0.5]),
    ]


def test_a_model_without_a_number_is_in_the_legend_alone():
    undefined = (float("nan"), (float("nan"), float("nan")))
    points = {
        "a": {"x": (0.1, (0.05, 0.2)), "y": undefined},
        "b": {"x": (0.3, None), "y": (0.5, None)},
    }
    figure = score_plots.versus(points, [("x", "y")])
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["a (undefined)", "b"] and not figure.axes[0].texts
    del points["b"]
    (ax,) = score_plots.versus(points, [("x", "y")]).axes
    assert [text.get_text() for text in ax.texts] == ["y: undefined"]


def test_each_pair_of_metrics_has_a_panel_and_all_share_a_legend():
    one = {"x": (0.1, None), "y": (0.9, None), "u": (2.0, None), "v": (3.0, None)}
    figure = score_plots.versus({"a": one}, [("x", "y"), ("u", "v")])
    first, second = figure.axes
    assert (second.get_xlabel(), second.get_ylabel()) == ("u", "v")
    assert [list(line.get_xdata()) for line in second.lines] == [[2.0]]
    assert [list(line.get_ydata()) for line in first.lines] == [[0.9]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a"]
