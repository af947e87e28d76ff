"""The report, one self-contained HTML file: verdict, numbers, figures; no script.

    numbers of `verdict.summarize`, figures --render--> text of report.html

It is for paper and for phones: figures are inlined as SVG and keep their font size;
tables and wide figures scroll sideways where there is no room for them. The template is
report.html.j2, its style page.css.
"""

import base64
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.study import verdict
from experiments.study.figures import Drawn
from experiments.study.verdict import Numbers
from sinder_jax.plots import style
from sinder_jax.storage import array_store

WIDE = 5.0  # inches; from here on a figure may not shrink to a phone's width


def render(summary: Numbers, figures: Sequence[Drawn]) -> str:
    """Returns the whole report as HTML.

    Args:
      summary: from `verdict.summarize`.
      figures: in the order they are shown in.
    """
    return verdict.TEMPLATES.get_template("report.html.j2").render(
        summary=summary,
        figures=figures,
        headline=verdict.headline(summary),
        condition=verdict.condition(summary["models"][-1]),
        paragraphs=verdict.paragraphs(summary),
        tool=array_store.tool(),
        svg=_svg,
        wide=WIDE,
        number=_number,
        short=_short,
    )


def _svg(figure: Figure) -> str:
    return base64.b64encode(style.encode(figure, "svg")).decode()


def _number(name: str, value: Any) -> str:
    """Formats a number of the summary; a dash if there is none."""
    if value is None or (name == "block" and value < 0):
        return "–"
    if name == "defective_share":
        return f"{100 * value:.2g}"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if "auc" in name else f"{value:.1f}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(f"{each:g}" for each in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
