"""Opens a model from any path: ours, a run's, or PyTorch files in any layout.

    path --open_model--> sinder_jax.model.Model, whose leaves are read when needed

The provenance of a model travels with it: from the file that first held the weights
into the checkpoint, and from there into every export.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import fetch
from convert.files import hugging_face, reading, sha256, strangers
from convert.state_dict import TorchModel
from convert.statements import RESAMPLING, statement
from sinder_jax import cli, vit
from sinder_jax import model as models
from sinder_jax.model import Model
from sinder_jax.storage import array_store, errors, paths, run_files
from sinder_jax.storage.paths import StrPath

# Fields that tensors do not tell, and that a file of this program therefore states.
STATED = ("family", "num_heads", "positions", *RESAMPLING, *vit.OWN)
ENTRY = "sinder_jax"  # under which a file's metadata holds our description of the model


def open_model(
    path: StrPath,
    num_heads: int | None = None,
    *,
    name: str | None = None,
    prefix: str | None = None,
    **overrides: Any,
) -> Model:
    """Opens a model; checks files against their `.sha256` if there is one.

    Args:
      path: a checkpoint directory or the workdir of a finished repair, on a disk or in
        a bucket; or a PyTorch file or Hugging Face directory on a disk.
      num_heads: None: what the files say, or as for `convert.from_torch`.
      name: source to record in the provenance; None: the name of `path`.
      prefix: as for `convert.from_torch`.
      **overrides: fields of `vit.ViTConfig`, likewise.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: not a DINOv2 model, damaged, or in contradiction to the arguments; one
        line.
      ImportError: `.pth` without torch.
    """
    if num_heads is not None:
        overrides["num_heads"] = num_heads
    path = paths.as_path(path)
    if str(path) in fetch.MODELS and not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or directory; `python -m convert to-jax {path} "
            f"{path}` fetches the published weights and makes that checkpoint"
        )
    if reading.is_torch_source(path):
        given = {"prefix": prefix, **overrides}
        return _open_torch(Path(path), name or path.name, given)
    if prefix is not None:
        raise ValueError(f"{path}: a prefix is for PyTorch files; leave it out")
    of_a_run = (run_files.FROZEN, run_files.REPAIRED, run_files.CLAIMS)
    if any((path / name).exists() for name in of_a_run):
        path = path / run_files.REPAIRED
        if not path.exists():
            raise ValueError(
                f"{path.parent}: this repair has not finished, or found nothing to "
                "repair, so there is no repaired model: resume it, or give the model "
                "it started from"
            )
    if not (path / "metadata").exists():
        what = strangers.describe(path, reading.FORMATS)
        raise ValueError(f"{path}: not a checkpoint, but {what}")
    model = models.open_checkpoint(path)
    config = dataclasses.replace(model.config, **overrides)
    if different := models.differences(model.config, config):
        raise ValueError(f"{path}: its config contradicts the arguments: {different}")
    return dataclasses.replace(model, config=config)


def _open_torch(path: Path, name: str, overrides: Mapping[str, Any]) -> Model:
    verified = sha256.check(path)
    state = reading.open_state_dict(path)
    stated = _description(path, state.metadata)
    statements = []
    if stated:
        known = {field: getattr(stated.config, field) for field in STATED}
        # None is the family's value, which the files beside the tensors may replace.
        statements = [
            statement(*x, "its metadata") for x in known.items() if x[1] is not None
        ]
    with _naming(path):
        torch = TorchModel(state, stated=statements, **overrides)
        extras = hugging_face.extras(state.contents)

    def leaf(path_of_leaf: str) -> np.ndarray:
        with _naming(path):
            return torch.leaf(path_of_leaf)

    provenance = (stated and stated.provenance) or {
        "source": cli.shown(name),  # readers of safetensors refuse what is no Unicode
        "layout": torch.layout,
        "sha256": sha256.of_files(state.files, verified),
        "tool": array_store.tool(),
        "steps": [],
    }
    if extras:
        provenance = {**provenance, "contents": extras}
    digest = stated.digest if stated else None
    return Model(torch.config, leaf, path, provenance, digest, torch=torch)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Begins errors about tensors with the path of their file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _description(path: Path, metadata: Mapping[str, str]) -> models.Description | None:
    """What a file of this program says about its model; None for other files."""
    if ENTRY not in metadata:
        return None
    try:
        return models.parse_description(json.loads(metadata[ENTRY]))
    except (ValueError, RecursionError) as error:
        raise errors.DamagedError(
            f"{path}: damaged, its metadata cannot be read "
            f"({errors.reason_of(error)}): fetch or convert it again"
        ) from None
