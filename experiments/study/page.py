"""The report, one self-contained HTML file: verdict, numbers, figures; no script.

    numbers of `verdict.summarize`, figures as SVG --render--> text of report.html

It is for paper and for phones: figures are inlined and keep their font size; tables and
wide figures scroll sideways where there is no room for them.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.study import verdict
from experiments.study.verdict import Numbers
from sinder_jax.storage import array_store


class Inlined(NamedTuple):
    """A figure of the report.

    Attributes:
      name: of its files.
      title, caption: in words.
      svg: the figure.
      inches: its width.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    inches: float


STYLE = Path(__file__).with_name("page.css")

WIDE = 5.0  # inches; from here on a figure may not shrink to a phone's width


def render(summary: Numbers, figures: Sequence[Inlined]) -> str:
    """Returns the whole report as HTML.

    Args:
      summary: from `verdict.summarize`.
      figures: in the order they are shown in.
    """
    models = summary["models"]
    headline = verdict.headline(summary)
    names = " and ".join(model["path"] for model in models)
    condition = verdict.condition(models[-1])
    parts = [
        f'<p class="kicker">Spectral analysis of {_text(names)}</p>',
        f"<h1>{_text(headline)}</h1>",
        f'<div class="verdict {condition}">',
        *_paragraphs(verdict.paragraphs(summary)),
        "</div>",
        "<h2>In numbers</h2>",
        _numbers(models),
        "<h2>The kernels that carry it</h2>",
        _kernels(summary),
        "<h2>The model</h2>" if len(models) == 1 else "<h2>The models</h2>",
        *(_provenance(model, several=len(models) > 1) for model in models),
    ]
    if models[0]["photographs"]:
        parts += ["<h2>Photograph by photograph</h2>", _photographs(models)]
    if figures:
        parts += ["<h2>Figures</h2>", *_figures(figures)]
    parts += [_options(summary["options"])]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(headline)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


# --- Sections -------------------------------------------------------------------------


def _paragraphs(texts: dict[str, str]) -> list[str]:
    """A single paragraph needs no title."""
    if len(texts) == 1:
        return [f"<p>{_text(text)}</p>" for text in texts.values()]
    return [
        f"<p><b>{_text(name)}.</b> {_text(text)}</p>" for name, text in texts.items()
    ]


def _numbers(models: Sequence[Numbers]) -> str:
    rows = [
        ("forecast: block in which a defect appears", "forecast", "block"),
        ("forecast: largest gap σ0/σ1", "forecast", "gap"),
        ("photographs", "overall", "photographs"),
        ("… that show a defect", "overall", "with_defect"),
        ("… from block", "overall", "block"),
        ("defective patches in the last block (%)", "overall", "defective_share"),
        ("largest / median norm in the last block", "overall", "norm_ratio"),
        ("largest / median norm in any block", "overall", "largest_norm_ratio"),
        (
            "measured direction to ν of the last block (degrees)",
            "overall",
            "angle_to_theory",
        ),
        ("… spread over the photographs (degrees)", "overall", "spread"),
        ("AUC of the angle to ν for tokens of large norm", "overall", "auc"),
        ("… of random directions, mean", "overall", "random_auc"),
    ]
    cells = []
    for label, section, name in rows:
        values = [model[section] and model[section][name] for model in models]
        if any(model[section] is not None for model in models):
            cells.append([label, *(_number(name, value) for value in values)])
    head = ["", *(model["name"] for model in models)] if len(models) > 1 else []
    return _table(head, cells)


def _kernels(summary: Numbers) -> str:
    blamed = summary["models"][0]["forecast"]["blamed"]
    if not blamed:
        return "<p>No defect is forecast, so there is no kernel to blame.</p>"
    after = {
        (row["block"], row["kernel"], row["index"]): row["after"]
        for row in summary["kernels"] or []
    }
    head = ["kernel", "block", "singular value", "size", "share of the gain along ν"]
    rows = []
    for each in blamed:
        row = [
            each["kernel"],
            str(each["block"]),
            f"number {each['index']}",
            f"{each['value']:.2f}",
            f"{100 * each['share']:.1f} %",
        ]
        if after:
            now = after.get((each["block"], each["kernel"], each["index"]))
            row.append("" if now is None else f"{now:.2f}")
        rows.append(row)
    note = (
        "<p>Singular values are numbered from 0, the largest. The share is what would "
        "be missing of the block's gain along ν without it; two kernels in a row carry "
        "the same share.</p>"
    )
    return _table([*head, "size after"] if after else head, rows) + note


def _provenance(model: Numbers, *, several: bool) -> str:
    shape = model["architecture"]
    origin = model["provenance"]
    registers = shape["num_register_tokens"]
    rows = [
        ["checkpoint", model["path"]],
        [
            "architecture",
            f"{shape['depth']} blocks of width {shape['embed_dim']}, "
            f"{shape['num_heads']} heads, FFN {shape['ffn_layer']}, patches of "
            f"{shape['patch_size']} pixels, "
            + (f"{registers} registers" if registers else "no registers"),
        ],
        ["parameters", f"{model['parameters']:,}"],
        ["digest of the weights", model["digest"]],
    ]
    labels = {"source": "first read from", "layout": "in layout", "sha256": "SHA-256"}
    rows += [[label, str(origin[k])] for k, label in labels.items() if origin.get(k)]
    rows += [["since then", step] for step in origin.get("steps", [])]
    title = f"<h3>{_text(model['name'])}</h3>" if several else ""
    return title + _table([], rows, text=True)


def _photographs(models: Sequence[Numbers]) -> str:
    several = len(models) > 1
    head = ["photograph", *(["model"] if several else []), "patches"]
    head += ["defect from block", "to", "defective in the last", "norm ratio"]
    rows = []
    for name in models[0]["photographs"]:
        for model in models:
            one = model["photographs"][name]
            rows.append([name, *([model["name"]] if several else [])])
            rows[-1] += [
                str(one["patches"]),
                _number("block", one["block"]),
                _number("block", one["last_block"]),
                f"{one['defective']} ({100 * one['defective_share']:.2g} %)",
                f"{one['norm_ratio']:.1f}",
            ]
    return _table(head, rows)


def _figures(figures: Sequence[Inlined]) -> list[str]:
    """Figures in a row that share a caption show it once."""
    captions = ["", *(each.caption for each in figures)]
    return [
        _figure(each, "" if each.caption == before else each.caption)
        for each, before in zip(figures, captions, strict=False)
    ]


def _figure(one: Inlined, caption: str) -> str:
    data = base64.b64encode(one.svg).decode()
    wide = ' class="wide"' if one.inches >= WIDE else ""
    return (
        f'<figure id="{_text(one.name)}"{wide}>\n<div class="scroll">'
        f'<img alt="{_text(one.title)}" style="--inches: {one.inches:.2f}" '
        f'src="data:image/svg+xml;base64,{data}"></div>\n'
        f"<figcaption><b>{_math(one.title)}.</b> {_math(caption)}</figcaption>\n"
        "</figure>"
    )


def _options(options: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {_short(value)}" for name, value in options.items())
    return (
        f"<footer><p>Made by {_text(array_store.tool())}, experiments.analyze, with "
        f"{_text(said)}. Method: SINDER, arXiv:2407.16826. A defective token is "
        "more than three times as long as the median token and lies along ν: detected "
        "by equation 5, or within 45 degrees of it. A photograph shows a defect where "
        "min_outliers of them are found in one block. Blocks and singular values count "
        "from 0.</p></footer>"
    )


# --- Pieces ---------------------------------------------------------------------------


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False
) -> str:
    kind = ' class="text"' if text else ""
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    body = "\n".join(
        f"<tr><td>{_text(first)}</td>"
        + "".join(f"<td{kind}>{_text(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table>{top}<tbody>\n{body}\n</tbody></table></div>'


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


def _math(text: str) -> str:
    return _text(text).replace("ν_i", "ν<sub><i>i</i></sub>")


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)
