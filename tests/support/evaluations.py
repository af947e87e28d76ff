"""Command lines and results of evaluations, and a model small enough for them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import small_runs
from sinder_jax import checkpoint, vit


def tiny_model(folder: Path, config: vit.ViTConfig) -> Path:
    """A checkpoint of random weights, in `folder`."""
    path = folder / "tiny"
    checkpoint.save(path, config, small_runs.weights(config))
    return path


def command(
    config: str, checkpoints: Iterable[Path], workdir: Path, **changes: Any
) -> list[str]:
    """Arguments of `experiments.evaluate`.

    Args:
      config: its name without .py.
      checkpoints: to evaluate.
      workdir: where results are written.
      **changes: of the config, by its keys.
    """
    return [
        f"--config={config}.py",
        *(f"--checkpoint={path}" for path in checkpoints),
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]


def results(workdir: Path) -> list[dict[str, Any]]:
    """The rows of results.json."""
    return json.loads((workdir / "results.json").read_text())
