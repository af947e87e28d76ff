"""A copy of PyTorch files with a changed backbone, and nothing else changed.

    Model, its leaves one by one --of--> names and arrays of what changed, digest
    files, what changed --write--> the same files otherwise

Whatever stands beside the backbone passes through: heads, buffers, prefixes, number
formats, what a training checkpoint holds besides, the other files of a directory. Only
the changed tensors are in memory.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert import infer, saving
from convert.files import reading, sha256, writing, writing_pth
from convert.files.tensors import StateDict
from convert.layouts import table as tables
from sinder_jax import param_tree
from sinder_jax.model import Model


class Repaired(NamedTuple):
    """What a repair changes in PyTorch files.

    Attributes:
      tensors: the changed ones, by full name and in their stored number formats.
      texts: metadata of the new files: the description of the repaired model.
      digest: of the repaired model, as its number formats hold it.
    """

    tensors: dict[str, np.ndarray]
    texts: dict[str, str]
    digest: str


def check_holds(path: Path, model: Model) -> None:
    """Refuses a file of another format that cannot hold all of the base.

    Raises:
      ValueError: names what stands beside the tensors.
    """
    state = model.torch.state
    if path.suffix == ".safetensors" and state.left_out:
        raise ValueError(
            f"{state.files[0]} holds entries beside the tensors, which a {path.suffix} "
            f"file cannot: {infer.listing(state.left_out, limit=3)}; write a .pth file"
        )


def of(model: Model, repair: Callable[[str, np.ndarray], np.ndarray]) -> Repaired:
    """Repairs a model leaf by leaf.

    Args:
      model: opened from PyTorch files.
      repair: returns the new leaf, from its flat name and the leaf; the leaf itself if
        it stays as it is.

    Raises:
      ValueError: a new number that the stored number format cannot hold.
    """
    torch, found = model.torch, param_tree.ModelDigest()
    changed: dict[str, np.ndarray] = {}

    def tensor(key: str) -> np.ndarray:
        return changed[key] if key in changed else torch.tensor(key)

    for path, old in model.leaves():
        new = repair(path, old)
        if new is not old:
            own = {k: slot for k, slot in torch.table.items() if slot.path == path}
            leaves = {path: new}
            for added in {slot.plus[0] for slot in own.values() if slot.plus}:
                leaves[added] = repair(added, model.leaf(added))
            for key, made in tables.to_tensors(own, leaves.__getitem__):
                stored = torch.tensor(key)
                if np.any(differs := _bits(stored) != _bits(made)):
                    changed[key] = _changed(stored, made, differs)
            # As the files will hold it.
            new = tables.from_tensors(path, old.shape, torch.table, tensor)
            if not param_tree.is_finite(new):
                formats = " and ".join(torch.formats)
                raise ValueError(f"{path}: changed, it does not fit into {formats}")
        found.add(path, new)
    digest = found.hexdigest()
    by_name = {torch.names[key]: array for key, array in changed.items()}
    return Repaired(by_name, saving.description(model, digest), digest)


def _bits(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 too large becomes infinite
        return np.ascontiguousarray(tensor, np.float32).view(np.uint32)


def _changed(stored: np.ndarray, new: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A tensor with the changed numbers; a float64 keeps all bits of the others."""
    made = np.array(stored)
    with np.errstate(over="ignore"):  # refused by `of`
        made[where] = new[where].astype(made.dtype)
    return made


def write(path: Path, model: Model, repaired: Repaired) -> Iterator[str]:
    """Writes a file, or a directory if the model is one; yields what was left out.

    Raises:
      As `writing.write_state_dict` and `writing.directory`.
    """
    state, base = model.torch.state, Path(model.path or "")
    if not base.is_dir():
        with writing.file(path) as partial:
            _write_file(partial, path.suffix, state, repaired)
        return
    weights = [x.name for x in state.files if x.suffix in reading.FORMATS]
    others, left_out = _beside(base, weights)
    with writing.directory(path) as partial:
        for name in weights:
            own = reading.open_state_dict(base / name)
            _write_file(partial / name, Path(name).suffix, own, repaired)
        for name in others:
            shutil.copyfile(base / name, partial / name)
    if left_out:
        yield (
            "left out, since they may hold the model before its repair: "
            f"{infer.listing(left_out)}."
        )


def _write_file(path: Path, suffix: str, state: StateDict, repaired: Repaired) -> None:
    texts = state.metadata | repaired.texts
    here = {key: array for key, array in repaired.tensors.items() if key in state}
    if state.whole is not None and suffix != ".safetensors":
        writing_pth.write_whole(path, _with(state.whole, state.nest, here), texts)
        return
    tensors = ((key, here[key] if key in here else state[key]) for key in state)
    writing.WRITERS[suffix](path, state.specs, tensors, lambda: texts)


def _with(whole: Any, nest: tuple[str, ...], tensors: Mapping[str, np.ndarray]) -> Any:
    """What a .pth holds, with other tensors; the mappings that change are copied."""
    made = copy.copy(whole)
    if nest:
        made[nest[0]] = _with(whole[nest[0]], nest[1:], tensors)
        return made
    for key, array in tensors.items():
        made[key] = writing_pth.like(whole[key], array)
    return made


def _beside(base: Path, weights: list[str]) -> tuple[list[str], list[str]]:
    """The other files of a directory: those to copy, and those to leave out."""
    copied, left_out = [], []
    for entry in sorted(base.iterdir()):
        if entry.name in weights or entry.name.endswith(sha256.SUFFIX):
            continue
        if entry.is_file() and entry.suffix not in OTHER_WEIGHTS:
            copied.append(entry.name)
        else:
            left_out.append(entry.name + ("/" if entry.is_dir() else ""))
    return copied, left_out


# Suffixes of weights in the formats of this and other programs.
OTHER_WEIGHTS = (*reading.FORMATS, ".h5", ".msgpack", ".onnx", ".ckpt", ".ot", ".gguf")
