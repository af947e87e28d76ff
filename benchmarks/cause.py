"""A step of CAUSE-TR's second stage, beside the same losses in PyTorch.

    python -m benchmarks.run cause

Both take tokens of the backbone, which are kept on the disk and cost nothing here.
Ours also inserts into the bank; PyTorch's keeps its own as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import process, torch_baseline, torch_cause
from benchmarks.timing import Numbers, in_turn, summary
from sinder_jax.evals import cause_head, contrastive, front_door, modularity
from sinder_jax.evals.cause_optimizer import Options
from sinder_jax.evals.concept_bank import ConceptBank

OURS, THEIRS = "ours", "PyTorch"


class Case:
    """One batch and two trainings that start alike.

    Args:
      images: B.
      side: tokens of a side of an image.
      dim: D.
      size: pixels of a side.
      codes: of the codebook.
      bank_size: places of each code.
      filled: projections in the bank.
      projected: numbers of a projection.
      classes: of the probe.
    """

    def __init__(
        self,
        *,
        images: int,
        side: int,
        dim: int,
        size: int,
        codes: int,
        bank_size: int,
        filled: int,
        projected: int = cause_head.PROJECTED,
        classes: int = 27,
    ):
        rng = np.random.default_rng(0)
        self._features = rng.standard_normal((images, side, side, dim), np.float32)
        self._labels = rng.integers(0, classes, (images, size, size)).astype(np.uint8)
        self._labels[:, : size // 8] = 255
        codebook = jnp.asarray(rng.standard_normal((codes, dim), np.float32))
        counts = np.full(codes, filled // codes)
        counts[: filled % codes] += 1
        start = front_door.init(
            jax.random.key(0),
            codebook,
            side * side,
            classes,
            projected=projected,
            bank_size=bank_size,
        )
        keys = rng.standard_normal(start.bank.keys.shape, np.float32)
        counts = jnp.asarray(counts, jnp.int32)
        bank = ConceptBank(jnp.asarray(keys), counts, counts % bank_size)
        self.state = start._replace(bank=bank)
        options = Options(lr=1e-3, clip=1.0)
        self.trainer = torch_cause.Trainer(
            self.state, codebook, options.lr, cause_head.DROPOUT
        )
        self._step = front_door.make_step(codebook, options)
        device = torch.get_default_device()
        self._torch_batch = (
            torch.from_numpy(self._features).flatten(1, 2).to(device),
            torch.from_numpy(self._labels).long().to(device),
        )
        self._taken = {OURS: 0, THEIRS: 0}

    def _key(self, name: str) -> Any:
        """Of the name's next step, so that both sample the same tokens."""
        self._taken[name] += 1
        return jax.random.fold_in(jax.random.key(1), self._taken[name])

    def ours(self) -> np.ndarray:
        """One step; returns its two losses."""
        self.state, losses = self._step(
            self.state,
            jnp.asarray(self._features),
            jnp.asarray(self._labels),
            self._key(OURS),
        )
        jax.block_until_ready(self.state)
        return np.asarray(losses)

    def theirs(self) -> np.ndarray:
        """One step in PyTorch; returns its two losses."""
        images, side, _, _ = self._features.shape
        key = jax.random.split(self._key(THEIRS), 4)[0]
        order = modularity.draw_order(key, images, side, side)
        numbers = jnp.arange(images * side * side).reshape(images, side, side, 1)
        cells = modularity.sample_cells(numbers % side**2, order)[..., 0]
        cells = torch.from_numpy(np.array(cells)).long()
        cells = cells.to(torch.get_default_device())
        return np.array(self.trainer.step(*self._torch_batch, cells))


def bench_cause(rounds: int, quick: bool) -> Numbers:
    """Compares steps at Cityscapes' size, of S: 16 images of 23 x 23 tokens.

    The bank holds 40,000 of the 204,800 projections there is place for; both are as
    fast as it is empty. The published training adds at most 200 a step, 93,200 in all.
    """
    torch_baseline.set_device(jax.default_backend() == "cpu")
    torch_baseline.set_precision("highest")
    sizes = {"images": 16, "side": 23, "dim": 384, "size": 322, "codes": 2_048}
    sizes |= {"bank_size": 100, "filled": 40_000}
    if quick:
        sizes = {"images": 2, "side": 8, "dim": 32, "size": 56, "codes": 64}
        sizes |= {"bank_size": 10, "filled": 200}
    case = Case(**sizes)
    calls = {THEIRS: case.theirs, OURS: case.ours}
    numbers = summary(in_turn(rounds, **calls), THEIRS)
    places = sizes["codes"] * sizes["bank_size"]
    bytes_of_bank = 4 * places * cause_head.PROJECTED
    numbers["projections in the bank"] = sizes["filled"]
    numbers["GiB of our bank"] = bytes_of_bank / 2**30
    numbers["keys compared at a time"] = min(contrastive.BLOCK, places)
    numbers["peak GiB of both"] = process.peak_bytes() / 2**30
    return numbers
