"""The figure of an evaluation: what each model scored, with intervals.

scores of models --scores, versus--> Figure
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sinder_jax.plots import style

Score = tuple[float, tuple[float, float] | None]
MOST_NAME = 32  # characters of a model's name on an axis ...
MOST_LABEL = 48  # ... and in a legend


@style.styled
def scores(points: Mapping[str, Mapping[str, Score]], unit: str) -> Figure:
    """A panel for each metric, a point for each model, and its interval.

    Args:
      points: by model, then by metric: the value and its interval.
      unit: of all metrics.
    """
    metrics = list(next(iter(points.values())))
    height = 0.6 + 0.2 * len(points)
    figure = style.new_figure(style.COLUMN, 0.3 + height * len(metrics))
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    for ax, metric in zip(panels, metrics, strict=True):
        for place, found in enumerate(points.values()):
            value, interval = found[metric]
            color = style.SERIES[place % len(style.SERIES)]
            marker = style.MARKERS[place % len(style.MARKERS)]
            if interval is not None:
                ax.plot(interval, [place, place], color=color)
            ax.plot([value], [place], marker=marker, color=color, ls="none")
        ax.set_yticks(range(len(points)), [_short(name) for name in points])
        ax.set_ylim(len(points) - 0.5, -0.5)
        ax.set_xlabel(f"{metric} ({unit})")
    return figure


@style.styled
def versus(
    points: Mapping[str, Mapping[str, Score]], pairs: Sequence[tuple[str, str]]
) -> Figure:
    """A point for each model, one metric over another, and the interval of each.

    Args:
      points: as for `scores`; without two numbers a model is in the legend alone.
      pairs: the metrics on the horizontal and on the vertical axis of each panel.
    """
    width = style.COLUMN if len(pairs) == 1 else style.PAGE
    figure = style.new_figure(width, 2.4 + 0.16 * len(points))
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for ax, (across, up) in zip(panels, pairs, strict=True):
        _panel(ax, points, across, up)
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=1)
    return figure


def _panel(
    ax: Axes, points: Mapping[str, Mapping[str, Score]], across: str, up: str
) -> None:
    for place, (name, found) in enumerate(points.items()):
        (x, wide), (y, high) = found[across], found[up]
        color = style.SERIES[place % len(style.SERIES)]
        marker = style.MARKERS[place % len(style.MARKERS)]
        if wide is not None:
            ax.plot(wide, [y, y], color=color, marker="|")
        if high is not None:
            ax.plot([x, x], high, color=color, marker="_")
        there = math.isfinite(x) and math.isfinite(y)
        label = _short(name, MOST_LABEL) + ("" if there else " (undefined)")
        ax.plot([x], [y], marker=marker, color=color, ls="none", label=label)
    if all(math.isnan(found[up][0]) for found in points.values()):
        ax.text(0.5, 0.5, f"{up}: undefined", ha="center", transform=ax.transAxes)
    ax.locator_params(axis="x", nbins=4)  # more would touch each other
    ax.set_xlabel(across)
    ax.set_ylabel(up)


def _short(name: str, most: int = MOST_NAME) -> str:
    """The end of a path that is too long, with nothing read as math."""
    name = name if len(name) <= most else f"…{name[1 - most :]}"
    return name.replace("$", r"\$")
