"""Mutated files of weights: what both formats share, for `mutations`.

    a small model --mutate--> FILE --to-jax--> params, compared with what FILE says now

Nothing but a checksum can tell a flipped bit in a weight from another weight. So a
result that is not the original's counts as "as stored" if the library of the format
reads the very same tensors from the file, and the file holds no digest of its own.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

import convert
from benchmarks.faults.trial import Trial
from convert.__main__ import main
from sinder_jax import checkpoint, param_tree, vit

CONFIG = vit.ViTConfig(64, 2, 1, "mlp", img_size=28)
Random = np.random.Generator
Arrays = Mapping[str, np.ndarray]


def as_torch(state: Arrays) -> dict[str, Any]:
    """The same tensors for PyTorch."""
    return {key: torch.from_numpy(np.array(array)) for key, array in state.items()}


def originals(folder: Path, rng: Random, suffix: str) -> list[Path]:
    """As the hub has it, and as we export it, with our digest in its metadata."""
    params = param_tree.unflatten(
        {
            path: rng.standard_normal(shape, np.float32)
            for path, shape in param_tree.leaf_shapes(CONFIG).items()
        }
    )
    checkpoint.save(folder / "model", CONFIG, params)
    hub, ours = folder / f"hub.{suffix}", folder / f"ours.{suffix}"
    state = convert.to_torch(CONFIG, params)
    if suffix == "pth":
        torch.save(as_torch(state), hub)
    else:
        safetensors.numpy.save_file(state, hub)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["to-torch", str(folder / "model"), str(ours)]) == 0
    return [hub, ours]


def trials(
    originals: Sequence[Path],
    rng: Random,
    mutations: Sequence[Callable[[Random, bytes], bytes]],
    load: Callable[[Path], Arrays],
) -> Iterator[Trial]:
    """Trials of files, each with one mutation of one original.

    Args:
      originals: files of one suffix and, up to their metadata, one model.
      rng: chooses original and mutation.
      mutations: from the bytes of a file to other bytes.
      load: the library's own way to read such a file.
    """
    want, path = _tensors(load, originals[0]), originals[0].with_stem("mutated")

    def judge(out: Path) -> str:
        got = convert.to_torch(*checkpoint.load(out))
        if _same(got, want):
            return "right"
        # "digest" stands in the metadata of our own files only. It covers all tensors
        # but the mask token, which timm's layout lacks.
        covered = [key for key in want if key != "mask_token"]
        unclaimed = b"digest" not in path.read_bytes() or _same(
            *({key: each[key] for key in covered} for each in (got, want))
        )
        return "as stored" if unclaimed and _is_stored(got) else "wrong"

    def _is_stored(got: Arrays) -> bool:
        try:
            return _same(got, _tensors(load, path))
        except Exception:  # the library refuses the file, in its own words
            return False

    yield Trial("nothing", ["to-jax", str(originals[0]), "OUT"], originals[0], judge)
    while True:
        original = originals[rng.integers(len(originals))]
        mutation = mutations[rng.integers(len(mutations))]
        path.write_bytes(mutation(rng, original.read_bytes()))
        what = f"{mutation.__name__} of {original.name}"
        yield Trial(what, ["to-jax", str(path), "OUT"], path, judge)


def _tensors(load: Callable[[Path], Arrays], path: Path) -> Arrays:
    return convert.to_torch(*convert.from_torch(load(path)))


def _same(first: Arrays, second: Arrays) -> bool:
    return first.keys() == second.keys() and all(
        array.tobytes() == second[key].tobytes() for key, array in first.items()
    )
