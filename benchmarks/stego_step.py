"""STEGO's step beside PyTorch, at the size of Cityscapes.

    python -m benchmarks.run stego

A step takes kept tokens of 16 images and of a positive each, 28 x 28 of S, and masks
of 392 pixels with 27 classes. That of PyTorch (`torch_stego.py`) is the original's,
from the same weights and with the same random numbers. Tokens lie on the
device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_device, torch_stego
from benchmarks.timing import Numbers, in_turn, summary
from sinder_jax.evals import stego

OPTIONS = stego.StegoOptions(stego.TABLE["cityscapes", "dinov2"])
PYTORCH = "PyTorch"


class Case:
    """One batch, head and probes, for us and for PyTorch.

    Args:
      images: of a batch, at least 2.
      grid: rows and columns of patches.
      dim: width of the tokens.
      classes: of the masks, which have 14 pixels a patch.
      device: of PyTorch.
    """

    def __init__(
        self, images: int, grid: int, dim: int, classes: int, device: torch.device
    ):
        rng = np.random.default_rng(0)
        shape = (2, images, grid, grid, dim)
        features = rng.standard_normal(shape, np.float32)
        labels = rng.integers(0, classes, (images, 14 * grid, 14 * grid))
        labels[rng.random(labels.shape) < 0.1] = 255
        self._batch = tuple(map(jnp.asarray, (*features, labels.astype(np.uint8))))
        self.state = stego.init(jax.random.key(0), dim, classes)
        key = jax.random.fold_in(jax.random.wrap_key_data(self.state.key), 0)
        draws = stego.draw(key, images, dim, OPTIONS)
        self._theirs = torch_stego.Baseline(self.state.params, OPTIONS, device)
        kept, coordinates, negatives = (
            torch.from_numpy(np.array(x)).to(device) for x in draws
        )
        self._given = (
            kept,
            coordinates,
            negatives.long(),
            torch.from_numpy(np.ascontiguousarray(np.moveaxis(features, 4, 2))).to(
                device
            ),
            torch.from_numpy(labels).to(device),
        )
        lowered = stego.compiled_step.lower(OPTIONS, self.state, *self._batch)
        self._step = lowered.compile()

    def ours(self) -> np.ndarray:
        """One step; returns its losses."""
        self.state, losses = self._step(self.state, *self._batch)
        jax.block_until_ready(self.state)
        return np.array(losses)

    def theirs(self) -> np.ndarray:
        """One step of PyTorch; returns its losses."""
        losses = self._theirs.step(*self._given)
        torch_device.wait()
        return np.array([x.item() for x in losses])

    def bytes(self) -> int:
        """What XLA reserves beside the batch and the state."""
        return self._step.memory_analysis().temp_size_in_bytes


def bench_stego(rounds: int, quick: bool) -> Numbers:
    """Compares a step of head and probes with PyTorch's."""
    sizes = (2, 4, 32, 5) if quick else (16, 28, 384, 27)
    case = Case(*sizes, torch_device.prepare("highest"))
    memory = case.bytes()
    difference = float(np.abs(case.ours() - case.theirs()).max())
    seconds = in_turn(rounds, **{PYTORCH: case.theirs, "ours": case.ours})
    numbers = summary(seconds, PYTORCH)
    numbers["steps/s"] = {k: 1 / x for k, x in numbers["seconds"].items()}
    numbers["MB beside batch and state, ours"] = memory / 1e6
    numbers["largest difference of a loss"] = difference
    return numbers
