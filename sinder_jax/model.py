"""What "a model" is: its architecture, its weights, and where they came from.

    DIR --open_checkpoint--> Model --leaf by leaf, or all params at once--> arrays
    config, params --Model.of--> Model --save--> DIR
    two configs --differences--> the fields in which the architectures differ

`convert.open_model` opens every kind of path: checkpoint directories, PyTorch files,
Hugging Face directories, workdirs of repairs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sinder_jax import families, param_tree
from sinder_jax.storage import array_store, errors
from sinder_jax.storage.ahead import ahead
from sinder_jax.storage.paths import AnyPath, StrPath, as_path
from sinder_jax.vit import OWN, ViTConfig

OURS = "sinder_jax"  # the layout of a checkpoint directory


@dataclasses.dataclass(eq=False)
class Model:
    """A model whose weights are in memory, or in files until they are needed.

    Attributes:
      config: the architecture.
      leaf: returns one leaf of the params by its flat name: float32, finite, and
        verified if the files hold a digest of it.
      path: where the model is stored; None for a model in memory.
      provenance: {"source", "layout", "sha256", "tool", "steps"}: the file that first
        held the weights, and what was done to them since. Empty if unknown. For a
        Hugging Face directory also "contents": by file name, what its JSON files say
        beyond the config, for the next such directory.
      known_digest: the digest that the files state or that all leaves gave; None while
        it is unknown.
      sha256: SHA-256 of the leaves, by flat name, as far as the files state it.
      torch: the tensors of PyTorch files, a `convert.state_dict.TorchModel`; None for a
        checkpoint or a model in memory.
    """

    config: ViTConfig
    leaf: Callable[[str], np.ndarray]
    path: AnyPath | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known_digest: str | None = None
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    torch: Any = None

    @classmethod
    def of(
        cls,
        config: ViTConfig,
        params: Mapping[str, Any],
        provenance: Mapping[str, Any] | None = None,
    ) -> "Model":
        """A model in memory; `params` is a nested params tree, NumPy or JAX."""
        flat = param_tree.flatten(params)
        made = cls(config, lambda path: np.asarray(flat[path]))
        made.provenance = dict(provenance or {})
        made.__dict__["params"] = params  # what the cached property returns
        return made

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the leaves by flat name."""
        return param_tree.leaf_shapes(self.config)

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (flat name, array) of every leaf; checks the digest at the end.

        Raises:
          As `leaf` and `check_digest`.
        """
        found = param_tree.ModelDigest()
        for path in self.shapes:
            array = self.leaf(path)
            found.add(path, array, self.sha256.get(path, ""))
            yield path, array
        self.check_digest(found.hexdigest())

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The whole params tree on the host, read once and kept (see `forget`)."""
        return param_tree.unflatten(dict(self.leaves()))

    def forget(self) -> None:
        """Drops the params; they are read again when they are next needed."""
        if self.path is not None:
            self.__dict__.pop("params", None)

    @property
    def digest(self) -> str:
        """`param_tree.digest` of the weights; reads all leaves if no file states it."""
        if self.known_digest is None:
            for _ in self.leaves():
                pass
        assert self.known_digest is not None, "set by check_digest"
        return self.known_digest

    def check_digest(self, found: str) -> None:
        """Compares the digest of all leaves read with what the files state.

        Raises:
          DamagedError: the weights are not those that were written.
        """
        if self.known_digest not in (None, found):
            raise errors.DamagedError(
                f"{self.path}: damaged, the tensors do not match the digest in its own "
                "metadata: fetch or convert it again"
            )
        self.known_digest = found

    def with_step(self, step: str) -> "Model":
        """The same model with one more step in its provenance."""
        steps = [*self.provenance.get("steps", []), step]
        return dataclasses.replace(self, provenance={**self.provenance, "steps": steps})

    @property
    def num_params(self) -> int:
        """Number of parameters of the params tree."""
        return param_tree.num_params(self.config)

    @property
    def layout(self) -> str:
        """Layout of the files: a key of `convert.layouts.LAYOUTS`, or "sinder_jax"."""
        return self.torch.layout if self.torch else OURS

    @property
    def num_tensors(self) -> int:
        """Number of tensors as stored; a checkpoint stores one per leaf."""
        return len(self.torch.specs) if self.torch else len(self.shapes)


# --- Checkpoint directories -----------------------------------------------------------


def open_checkpoint(path: StrPath) -> Model:
    """Opens a checkpoint directory; its leaves are read when they are needed.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: not a model checkpoint, damaged, or its arrays do not fit its own
        config; one line.
    """
    reader = array_store.Reader(path)
    try:
        config, provenance, digest = parse_description(reader.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: not a model checkpoint ({error})") from None
    stored = {name: tuple(entry["shape"]) for name, entry in reader.arrays.items()}
    try:  # before anything is read
        param_tree.check_leaf_shapes(config, stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def leaf(name: str) -> np.ndarray:
        array = reader.read(name)
        if wrong := param_tree.misfit(name, array):
            raise ValueError(f"{path}: {wrong}")
        return array

    sha256 = {name: entry["sha256"] for name, entry in reader.arrays.items()}
    return Model(config, leaf, as_path(path), provenance, digest, sha256)


def save(path: StrPath, model: Model) -> str:
    """Writes a model as a checkpoint directory, leaf by leaf; returns its digest.

    The next leaf is read while one is written. The caller has checked the leaves:
    `checkpoint.save` does that for a model in memory.

    Args:
      path: a directory that does not exist, in one that does; or gs://bucket/name.
      model: the model; its config and provenance are stored with the weights.

    Raises:
      As `storage.array_store.writing`, `Model.leaf` and `Model.check_digest`.
    """
    metadata = description(model.config, model.provenance)
    found, names = param_tree.ModelDigest(), list(model.shapes)
    with array_store.writing(path, metadata) as writer:
        for name, array in zip(names, ahead(model.leaf, names), strict=True):
            found.add(name, array, writer.write(name, array))
        model.check_digest(found.hexdigest())
        metadata["digest"] = found.hexdigest()
    return found.hexdigest()


def description(
    config: ViTConfig, provenance: Mapping[str, Any], digest: str = ""
) -> dict[str, Any]:
    """What a file of this program says about its model, as JSON values."""
    return {
        "config": config.as_dict(),
        "provenance": dict(provenance),
        "digest": digest,
    }


class Description(NamedTuple):
    """What a file of this program says about its model."""

    config: ViTConfig
    provenance: dict[str, Any]
    digest: str


def parse_description(told: Any) -> Description:
    """The inverse of `description`, for JSON values from any file.

    Raises:
      ValueError: anything else; one line.
    """
    try:
        config = ViTConfig(**told["config"])
        hash(config)  # a list in place of a number would be found only later
        provenance = dict(told["provenance"])
        digest = str(told["digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(errors.reason_of(error)) from None
    steps = provenance.get("steps", [])
    if not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        raise ValueError("damaged: the steps of its provenance are not a list of texts")
    contents = provenance.get("contents", {})
    if not (
        isinstance(contents, dict)
        and all(isinstance(values, dict) for values in contents.values())
    ):
        raise ValueError("damaged: the contents of its provenance are not objects")
    return Description(config, provenance, digest)


# --- Two models -----------------------------------------------------------------------


def differences(first: ViTConfig, second: ViTConfig, *, grid: bool = True) -> str:
    """Names the fields in which two architectures differ, with both values.

    How the position embedding is resampled and how images are normalized is ignored: it
    is not part of the architecture, and most files of weights do not state it.

    Args:
      first: an architecture.
      second: another one.
      grid: False also ignores `img_size`, the size of the stored position embedding.

    Returns:
      Such as "embed_dim (384 and 768), depth (12 and 24)"; empty if they are the same.
    """
    ignored = {"interpolate_antialias", "interpolate_offset", "statistics"}
    ignored |= set() if grid else {"img_size"}

    def shown(config: ViTConfig, name: str) -> Any:
        if name == "hidden_width":
            return config.hidden_dim
        return getattr(families.of(config) if name in OWN else config, name)

    names = [field.name for field in dataclasses.fields(first)]
    return ", ".join(
        f"{name} ({shown(first, name)} and {shown(second, name)})"
        for name in names
        if getattr(first, name) != getattr(second, name) and name not in ignored
    )


def check_same_architecture(first: Model, second: Model) -> None:
    """Refuses two models that cannot be compared token by token.

    Each model keeps its own stored grid, its own way to resample it and its own image
    statistics.

    Raises:
      ValueError: names both paths and every field that differs.
    """
    if different := differences(first.config, second.config, grid=False):
        raise ValueError(
            f"{first.path} and {second.path} have different architectures: {different}"
        )
