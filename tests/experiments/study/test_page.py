"""study/page.py and the words of verdict.py, from made-up numbers."""

import base64
import copy
import html.parser
import re

import pytest

from experiments.study import page, verdict
from experiments.study.figures import Drawn
from sinder_jax.plots import style


def model(name="model", *, forecast=5, seen=(3, 3), block=5, ratio=16.0):
    """Numbers of a model; forecast: block or -1; seen: photographs with it, all."""
    with_defect, total = seen
    overall = {
        "photographs": total,
        "with_defect": with_defect,
        "block": block if with_defect else -1,
        "defective_share": 0.027 if with_defect else 0.0,
        "detected": 7.0,
        "large": 7.0,
        "norm_ratio": ratio,
        "largest_norm_ratio": ratio + 1,
        "angle_to_theory": 7.3,
        "spread": 2.2,
        "auc": 0.998 if with_defect else None,
        "random_auc": 0.51 if with_defect else None,
        "random_directions": 200,
    }
    photo = {
        "patches": 256,
        "block": overall["block"],
        "last_block": 11 if with_defect else -1,
        "defective": 7 if with_defect else 0,
        "defective_share": overall["defective_share"],
        "norm_ratio": ratio,
    }
    blame = {"block": 5, "kernel": "mlp/w3", "index": 0, "value": 9.05, "share": 0.993}
    return {
        "name": name,
        "path": f"runs/{name}<b>",
        "digest": "0123456789abcdef" * 4,
        "architecture": {
            "embed_dim": 128,
            "depth": 12,
            "num_heads": 2,
            "ffn_layer": "swiglu",
            "patch_size": 14,
            "num_register_tokens": 0,
        },
        "parameters": 2_505_536,
        "provenance": {"source": "hub.pth", "sha256": "ff" * 32, "steps": ["repaired"]},
        "forecast": {
            "has_defect": forecast >= 0,
            "block": forecast,
            "gap": 11.5,
            "blamed": [blame] if forecast >= 0 else [],
            "verdict": "What the weights say.",
        },
        "photographs": {"villa": photo} if total else {},
        "overall": overall if total else None,
    }


def summary(*models):
    change = {"block": 5, "kernel": "mlp/w3", "index": 0, "before": 9.05, "after": 2.0}
    options = {"mask_thr": 4.0, "num_probes": 100_000, "gammas": [2.0, 1.5]}
    kernels = [change] if len(models) > 1 else None
    return {"models": list(models), "options": options, "kernels": kernels}


DEFECT = {}
SOUND = {"forecast": -1, "seen": (0, 3), "ratio": 1.4}
TRACES = {"forecast": -1, "seen": (1, 3)}
FIGURES = [
    Drawn(*words, style.new_figure(width, 1.0), {})
    for *words, width in (
        ("angles-a", "Angles to ν_i, a", "How to read it.", 3.35),
        ("angles-b", "Angles to ν_i, b", "How to read it.", 3.35),
        ("pca-a", "PCA", "Other <words>.", 6.9),
    )
]


class Tags(html.parser.HTMLParser):
    """Checks that what is opened is closed, and collects attributes."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.names = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# --- The file -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    both = summary(model("before"), model("after", **SOUND))
    return without_gaps(page.render(both, FIGURES))


def without_gaps(text):
    """White space between tags is not seen."""
    return re.sub(r">\s+<", "><", text)


def test_page_is_well_formed_and_refers_to_nothing_outside(text):
    tags = Tags(text)
    assert not {"script", "link", "iframe"} & set(tags.names)
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert len(sources) == len(FIGURES)
    assert all(x.startswith("data:image/svg+xml;base64,") for x in sources)
    svgs = [style.encode(figure.figure, "svg") for figure in FIGURES]
    assert [base64.b64decode(x.split(",")[1]) for x in sources] == svgs
    assert not re.search(r"https?:|url\(|@import", text)


def test_page_is_for_phones_and_for_paper(text):
    attributes = Tags(text).attributes
    assert ("content", "width=device-width, initial-scale=1") in attributes
    assert "@media print" in text and "break-inside: avoid" in text
    assert ("style", "--inches: 3.35") in attributes
    assert text.count('class="wide"') == 1  # scrolls sideways on a phone


def test_text_is_escaped(text):
    assert "runs/before&lt;b&gt;" in text and "runs/before<b>" not in text
    assert "Other &lt;words&gt;." in text


def test_every_figure_has_a_text_in_place_of_it(text):
    alt = [value for name, value in Tags(text).attributes if name == "alt"]
    assert alt == [figure.title for figure in FIGURES]


def test_caption_is_said_once_in_a_row(text):
    assert text.count("How to read it.") == 1
    assert "ν<sub><i>i</i></sub>" in text  # in captions; alt texts are plain


def test_page_tells_model_numbers_kernels_and_options(text):
    for part in (
        "12 blocks of width 128, 2 heads, FFN swiglu",
        "2,505,536",
        "0123456789abcdef" * 4,
        "hub.pth",
        "repaired",
        "<td>mlp/w3</td><td>5</td><td>number 0</td><td>9.05</td><td>99.3 %</td>"
        "<td>2.00</td>",
        "<td>villa</td><td>before</td><td>256</td><td>5</td><td>11</td>"
        "<td>7 (2.7 %)</td><td>16.0</td>",
        "mask_thr 4.0, num_probes 100,000, gammas 2/1.5",
    ):
        assert part in text, part


def test_what_there_is_not_is_a_dash(text):
    assert (
        "<td>… from block</td><td>5</td><td>–</td>" in text
        and "<td>… of random directions, mean</td><td>0.510</td><td>–</td>" in text
    )
    assert ">None<" not in text and "nan" not in text


def test_page_of_weights_alone_has_no_photographs():
    text = page.render(summary(model(seen=(0, 0))), [])
    Tags(text)
    assert "Photograph by photograph" not in text and "Figures" not in text
    assert "photographs" not in text.split("<footer>")[0]


def test_page_without_defect_blames_no_kernel():
    text = page.render(summary(model(**SOUND)), [])
    assert "there is no kernel to blame" in text


# --- The words ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "want"),
    [
        ([DEFECT], "This model has a singular defect."),
        ([SOUND], "This model has no singular defect."),
        ([TRACES], "This model shows traces of a singular defect."),
        (
            [{"seen": (0, 0)}],
            "This model has a singular defect, as far as the weights tell.",
        ),
        (
            [DEFECT, SOUND],
            "Before, the model has a singular defect; after, it has no singular "
            "defect.",
        ),
        ([SOUND, SOUND], "Before and after, the model has no singular defect."),
    ],
)
def test_headline_follows_from_the_numbers(models, want):
    assert verdict.headline(summary(*(model(**each) for each in models))) == want


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"seen": (2, 3)}, "defect"),
        ({"seen": (1, 2)}, "defect"),
        ({"seen": (1, 3)}, "traces"),
        ({"seen": (0, 3), "ratio": 3.1}, "traces"),
        ({"seen": (0, 3), "ratio": 2.9}, "traces"),  # the forecast says defect
        ({"seen": (0, 3), "ratio": 2.9, "forecast": -1}, "sound"),
        ({"seen": (0, 0)}, "defect"),
        ({"seen": (0, 0), "forecast": -1}, "sound"),
    ],
)
def test_condition_follows_from_the_numbers(change, want):
    assert verdict.condition(model(**change)) == want


def only(*models):
    return verdict.paragraphs(summary(*models))


def test_paragraph_says_where_and_how_strong():
    (text,) = only(model()).values()
    assert text.startswith(
        "What the weights say. 3 of 3 photographs show it, from block"
    )
    for part in ("block 5 on", "2.7\u00a0% of", "16.0 times", "7.3°", "0.998", "0.51"):
        assert part in text, part
    assert "The forecast named the same block." in text


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"forecast": 4}, "The forecast named block 4"),
        ({"forecast": -1}, "The forecast did not see it"),
        ({"seen": (0, 3), "ratio": 1.4}, "these photographs do not trigger it"),
        ({"seen": (0, 3)}, "17.0 times as long as the median, but too few of them lie"),
        ({"seen": (0, 1), "ratio": 1.4}, "None of 1 photograph shows one"),
    ],
)
def test_paragraph_says_where_forecast_and_photographs_differ(change, want):
    (text,) = only(model(**change)).values()
    assert want in text


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        (DEFECT, SOUND, "The defect of the first model is gone in the second."),
        (DEFECT, TRACES, "is weaker in the second, but not gone."),
        (DEFECT, DEFECT, "the verdict does not change"),
        (SOUND, DEFECT, "The second model is worse than the first."),
    ],
)
def test_comparison_follows_from_the_numbers(before, after, want):
    text = only(model("before", **before), model("after", **after))["Compared"]
    assert want in text
    assert "1 of the 1 singular values that carried the defect became smaller" in text
    assert "from 9.05 to 2.00" in text


def test_comparison_counts_only_what_became_smaller():
    both = summary(model("before"), model("after"))
    larger = copy.deepcopy(both["kernels"][0]) | {"after": 9.5}
    both["kernels"].append(larger)
    assert "1 of the 2 singular values" in verdict.paragraphs(both)["Compared"]
