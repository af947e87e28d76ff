"""A model wherever it stands: a checkpoint of ours or PyTorch files in any layout.

    path --open_model--> Model: architecture, where it comes from, its leaves one by one

What is known of a model's origin travels with it: from the file it came in into the
checkpoint, and from there into every export.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import read, write
from convert.names import TorchModel
from sinder_jax import checkpoint, param_tree, vit
from sinder_jax.storage import array_store
from sinder_jax.storage.paths import AnyPath

OURS = "sinder_jax"
ENTRY = "sinder_jax"  # of a file's metadata
Provenance = dict[str, Any]


@dataclasses.dataclass
class Model:
    """A model whose leaves are read as they are asked for.

    Attributes:
      path: where it stands.
      config: the architecture.
      shapes: of the leaves, by flat name.
      leaf: gives a leaf by its flat name: float32, finite, verified where a digest of
        it is known.
      digest: what its files say that `param_tree.digest` is, or None.
      sha256: of the leaves, by flat name, where it is known and verified.
      provenance: {"source", "layout", "sha256", "tool", "steps"}: the file that the
        weights first came in, and what was done since.
      torch: how its tensors are laid out; None for a checkpoint of ours.
      formats: number formats of its tensors.
      num_tensors: how many it has there.
      files: the PyTorch files.
      extra: what a Hugging Face directory says besides, by file name.
      left_out: what else is in the files, by name.
    """

    path: AnyPath
    config: vit.ViTConfig
    shapes: Mapping[str, tuple[int, ...]]
    leaf: Callable[[str], np.ndarray]
    digest: str | None
    provenance: Provenance
    torch: TorchModel | None
    formats: list[str]
    num_tensors: int
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: list[Path] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)

    @property
    def layout(self) -> str:
        """Its layout, a key of `layouts.LAYOUTS` or "sinder_jax"."""
        return self.torch.layout if self.torch else OURS

    @property
    def num_params(self) -> int:
        """Number of parameters of the params tree."""
        return param_tree.num_params(self.config)

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """All leaves in turn; at their end, the digest of the whole is checked.

        Raises:
          As `leaf` and `check_digest`.
        """
        found = param_tree.ModelDigest()
        for path in self.shapes:
            array = self.leaf(path)
            found.add(path, array, self.sha256.get(path, ""))
            yield path, array
        self.check_digest(found.hexdigest())

    def check_digest(self, found: str) -> None:
        """Holds the digest of the leaves that were read against what the files say.

        Raises:
          store.DamagedError: the numbers are not those that the files tell of.
        """
        if self.digest not in (None, found):
            raise array_store.DamagedError(
                f"{self.path}: damaged, its tensors are not those that its own "
                "metadata tells of: fetch or convert it again."
            )


def open_model(
    path: AnyPath,
    num_heads: int | None = None,
    name: str | None = None,
    **overrides: Any,
) -> Model:
    """A model of a path, its files held against their `.sha256` if they have one.

    Args:
      path: a checkpoint directory of ours, of a disk or a bucket; a PyTorch file or a
        Hugging Face directory, of a disk.
      num_heads: None: what the files say, or embed_dim // 64.
      name: of the source, for its provenance; None: the path's.
      overrides: fields of `vit.ViTConfig`, see `convert.from_torch`.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: no DINOv2, damaged, or contradicting the arguments; one line.
      ImportError: `.pth` without torch.
    """
    if read.is_torch_source(path):
        return _open_torch(path, num_heads, name or path.name, overrides)
    if not (path / "metadata").exists():
        raise ValueError(
            f"{path}: no checkpoint, but a directory that holds neither one of ours "
            f"nor {' nor '.join(read.WEIGHTS)}."
        )
    return _open_checkpoint(path, num_heads)


def _open_checkpoint(path: AnyPath, num_heads: int | None) -> Model:
    reader = checkpoint.ModelReader(path)
    if num_heads not in (None, reader.config.num_heads):
        raise ValueError(f"{path}: has {reader.config.num_heads} heads.")
    return Model(
        path=path,
        config=reader.config,
        shapes={name: tuple(x["shape"]) for name, x in reader.arrays.items()},
        leaf=reader.read,
        digest=reader.digest,
        provenance=_readable(path, reader.provenance),
        torch=None,
        formats=sorted({entry["dtype"] for entry in reader.arrays.values()}),
        num_tensors=len(reader.arrays),
        sha256={name: x["sha256"] for name, x in reader.arrays.items()},
    )


def _open_torch(
    path: Path, num_heads: int | None, name: str, overrides: Mapping[str, Any]
) -> Model:
    verified = write.check_side_file(path)
    state = read.open_state_dict(path)
    told = _own_entry(path, state.metadata)
    known = _known(told, state.config)
    if num_heads is None:
        num_heads = known.pop("num_heads", None)
    known.pop("num_heads", None)
    try:
        model = TorchModel(state, num_heads, **(known | dict(overrides)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def leaf(path_of_leaf: str) -> np.ndarray:
        try:
            return model.leaf(path_of_leaf)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    provenance = told.get("provenance") or {
        "source": name,
        "layout": model.layout,
        "sha256": read.sha256_of_files(state.files, verified),
        "tool": array_store.tool(),
        "steps": [],
    }
    return Model(
        path=path,
        config=model.config,
        shapes=model.shapes,
        leaf=leaf,
        digest=told.get("digest"),
        provenance=provenance,
        torch=model,
        formats=model.formats,
        num_tensors=len(model.specs),
        files=state.files,
        extra=_extra_files(path, state.config),
        left_out=[*state.left_out, *model.left_out],
    )


def _own_entry(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file of ours says of itself; of other files an empty dict."""
    if ENTRY not in metadata:
        return {}
    try:
        told = json.loads(metadata[ENTRY])
        vit.ViTConfig(**told["config"])
        provenance = _readable(path, dict(told["provenance"]))
        return {**told, "provenance": provenance, "digest": str(told["digest"])}
    except array_store.DamagedError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise array_store.DamagedError(
            f"{path}: damaged, its metadata cannot be read "
            f"({array_store.reason_of(error)}): fetch or convert it again."
        ) from None


def _readable(path: AnyPath, provenance: Provenance) -> Provenance:
    """A provenance as it stands in a file, perhaps a stranger's."""
    steps = provenance.get("steps", [])
    if not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        raise array_store.DamagedError(
            f"{path}: damaged, the steps of its provenance are no list of texts: fetch "
            "or convert it again."
        )
    return provenance


def _known(told: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config that tensors cannot tell, where the files do."""
    names = ("num_heads", "interpolate_antialias", "interpolate_offset")
    if told:
        return {name: told["config"][name] for name in names}
    heads = config.get("num_attention_heads")
    return {"num_heads": heads} if isinstance(heads, int) and heads > 0 else {}


def _extra_files(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if not config:
        return {}
    processor = path / "preprocessor_config.json"
    found = {processor.name: read.read_json(processor)} if processor.exists() else {}
    return {read.CONFIG: dict(config), **found}


def with_step(provenance: Mapping[str, Any], step: str) -> Provenance:
    """The provenance of what `step` makes of a model."""
    return {**provenance, "steps": [*provenance.get("steps", []), step]}


def metadata_of(
    config: vit.ViTConfig, provenance: Mapping[str, Any], model_digest: str
) -> dict[str, str]:
    """What a file of ours says of itself, as text by name.

    Args:
      config: the architecture.
      provenance: of the model.
      model_digest: 64 hexadecimal digits, also while they are not known yet.
    """
    told = {
        "config": dataclasses.asdict(config),
        "digest": model_digest,
        "provenance": dict(provenance),
    }
    return {ENTRY: json.dumps(told, sort_keys=True)}
