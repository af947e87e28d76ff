"""Several models in one table: which of them has a singular defect, and where.

summaries by model --rows--> JSON values --table--> Markdown
"""

from collections.abc import Mapping, Sequence
from typing import Any

from convert import infer
from experiments.study import verdict
from experiments.study.verdict import Numbers
from sinder_jax import vit
from sinder_jax.analysis import diagnosis

# Heading of each column, by the name in a row.
COLUMNS = {
    "name": "model",
    "family": "architecture of",
    "width": "width",
    "depth": "blocks",
    "patch_size": "patch",
    "registers": "registers",
    "block": "forecast: block",
    "gap": "largest gap σ0/σ1",
    "channels": "largest channels of ν",
    "verdict": "verdict",
}


def rows(summaries: Mapping[str, Numbers]) -> list[dict[str, Any]]:
    """One row per model, from the summaries of `verdict.summarize` by name."""
    return [_row(name, summary["models"][0]) for name, summary in summaries.items()]


def _row(name: str, model: Numbers) -> dict[str, Any]:
    config = vit.ViTConfig(**model["architecture"])
    forecast = model["forecast"]
    return {
        "name": name,
        "path": model["path"],
        "digest": model["digest"],
        "family": " or ".join(infer.same_shapes(config)) or config.family,
        "width": config.embed_dim,
        "depth": config.depth,
        "patch_size": config.patch_size,
        "registers": config.num_register_tokens,
        "block": forecast["block"] if forecast["has_defect"] else None,
        "gap": forecast["gap"],
        "channels": forecast["channels"],
        "verdict": diagnosis.CONDITIONS[verdict.condition(model)],
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown, a line each."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[_text(row[name]) for name in COLUMNS] for row in found]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(f"{channel} ({size:.2f})" for channel, size in value)
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
