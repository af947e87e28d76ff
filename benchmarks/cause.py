"""A step of CAUSE-TR's second stage, beside the same losses in PyTorch.

    python -m benchmarks.run cause

Both take tokens of the backbone that lie on the device. Ours also inserts into the
bank; PyTorch's keeps its own as it is. Every step samples the same tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import giant_step, torch_cause, torch_device
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
      device: of PyTorch.
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
        device: torch.device | None = None,
    ):
        rng = np.random.default_rng(0)
        features = rng.standard_normal((images, side, side, dim), np.float32)
        labels = rng.integers(0, classes, (images, size, size)).astype(np.uint8)
        labels[:, : size // 8] = 255
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
            self.state, codebook, options.lr, cause_head.DROPOUT, device
        )
        self._step = front_door.make_step(codebook, options)
        key = jax.random.key(1)
        self._batch = jnp.asarray(features), jnp.asarray(labels), key
        self._torch_batch = (
            torch.from_numpy(features).flatten(1, 2).to(device),
            torch.from_numpy(labels).long().to(device),
            torch.from_numpy(_sampled(key, images, side)).long().to(device),
        )

    def ours(self) -> np.ndarray:
        """One step; returns its two losses."""
        self.state, losses = self._step(self.state, *self._batch)
        jax.block_until_ready(self.state)
        return np.asarray(losses)

    def theirs(self) -> np.ndarray:
        """One step in PyTorch; returns its two losses."""
        return np.array(self.trainer.step(*self._torch_batch))


def _sampled(key: jax.Array, images: int, side: int) -> np.ndarray:
    """Numbers of the tokens that our step samples with a key, [images, n]."""
    order = modularity.draw_order(jax.random.split(key, 4)[0], images, side, side)
    numbers = np.arange(side**2, dtype=np.int32).reshape(1, side, side, 1)
    maps = jnp.asarray(numbers.repeat(images, axis=0))
    return np.array(modularity.sample_cells(maps, order)[..., 0])


def bench_cause(rounds: int, quick: bool) -> Numbers:
    """Compares steps at Cityscapes' size, of S: 16 images of 23 x 23 tokens.

    The bank holds 40,000 of the 204,800 projections there is place for; both are as
    fast as it is empty. The published training adds at most 200 a step, 93,200 in all.
    """
    device = torch_device.prepare("highest")
    sizes = {"images": 16, "side": 23, "dim": 384, "size": 322, "codes": 2_048}
    sizes |= {"bank_size": 100, "filled": 40_000}
    if quick:
        sizes = {"images": 2, "side": 8, "dim": 32, "size": 56, "codes": 4}
        sizes |= {"bank_size": 50, "filled": 100}
    case = Case(**sizes, device=device)
    calls = {THEIRS: case.theirs, OURS: case.ours}
    first = {name: call() for name, call in calls.items()}
    numbers = summary(in_turn(rounds, **calls), THEIRS)
    # Alike, not equal: each draws its own dropout.
    numbers["losses of the first step"] = {
        name: {"contrastive": float(losses[0]), "probe": float(losses[1])}
        for name, losses in first.items()
    }
    places = sizes["codes"] * sizes["bank_size"]
    bytes_of_bank = 4 * places * cause_head.PROJECTED
    numbers["projections in the bank"] = sizes["filled"]
    numbers["GiB of our bank"] = bytes_of_bank / 2**30
    numbers["keys compared at a time"] = min(contrastive.BLOCK, places)
    return numbers | giant_step.device_memory()
