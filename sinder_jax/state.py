"""The options of a repair, what it reads and what it changes; how to start and resume.

config, params, options --init--> Frozen (read), RepairState (changed)
RepairState --to_saved--> stored without its kernels --from_saved--> RepairState
Frozen, RepairState --merged_params--> params of the repaired model
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sinder_jax import defects, factor, kernels, loss, param_tree, placement
from sinder_jax.factor import Factors
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

REDUCTIONS = ("sum", "mean")
PRECISIONS = ("highest", "high", "default")
TRAINED = ("eps", "momentum")
COUNTS = ("num_images", "num_counted", "num_bad", "bad_in_row")
Kernels = dict[str, Any]  # by `kernels.names`, blocks on the leading axis


@dataclasses.dataclass(frozen=True)
class RepairOptions:
    """Everything that determines the course of a repair; the defaults are the authors'.

    Attributes:
      lr: SGD's learning rate; ε is in units of the singular values.
      momentum: PyTorch's convention, velocity = momentum·velocity + gradient.
      mask_thr: a patch is an outlier this many standard deviations off the mean.
      min_outliers: a block with this many outliers has a defect (`skip_less_than`).
      window: side of the neighbor window in patches, 3 or 5 (the authors' `kernel`).
      temperature: τ of the learning target.
      active_blocks: how many blocks are updated, the last of them the defect's; None
        means all up to it (the authors' `limit_layers`, whose 0 means all).
      reduce: a block's gradient is the "sum" or the "mean" over the images of a step
        whose window contains it.
      matmul_precision: of every matrix product: "highest", "high" (TF32 on a GPU, the
        authors' setting) or "default".
      max_iter: stop after this many images.
      history: number of last images the stopping rule looks at.
      stop_share: stop when this share of them had no defect, above 0 and at most 1.
      first_block: defects are looked for from this block on; with 0, the authors', in
        all blocks.

    Raises:
      ValueError: an option out of range.
    """

    lr: float = 0.005
    momentum: float = 0.9
    mask_thr: float = 4.0
    min_outliers: int = 3
    window: int = 3
    temperature: float = 0.1
    active_blocks: int | None = 10
    reduce: str = "sum"
    matmul_precision: str = "highest"
    max_iter: int = 30_000
    history: int = 1_000
    stop_share: float = 0.75
    first_block: int = 0

    def __post_init__(self):
        loss.check_loss_options(
            mask_thr=self.mask_thr, window=self.window, temperature=self.temperature
        )
        active, precision = self.active_blocks, self.matmul_precision
        rules = {
            "lr": (self.lr > 0, "above 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "active_blocks": (active is None or active >= 1, "at least 1 or None"),
            "first_block": (self.first_block >= 0, "at least 0"),
            "reduce": (self.reduce in REDUCTIONS, f"one of {REDUCTIONS}"),
            "matmul_precision": (precision in PRECISIONS, f"one of {PRECISIONS}"),
            "stop_share": (0 < self.stop_share <= 1, "in (0, 1]"),
            "min_outliers": (self.min_outliers >= 1, "at least 1"),
            "max_iter": (self.max_iter >= 1, "at least 1"),
            "history": (self.history >= 1, "at least 1"),
        }
        for name, rule in rules.items():
            loss.check_option(name, getattr(self, name), *rule)


@struct.dataclass
class Frozen:
    """What a repair reads and never changes.

    Attributes:
      params: the params tree without its trainable kernels (`kernels.split`).
      factors: U, σ and V of the trainable kernels.
      directions: singular defect directions of the original model [L, D], unit or zero
        rows.
    """

    params: Params
    factors: Factors
    directions: Any


@struct.dataclass
class RepairState:
    """What a repair changes.

    Attributes:
      eps: changes of the singular values, a dict like `factors.sigma`.
      momentum: SGD's velocity of ε, likewise.
      merged: the trainable kernels [L, in, out] with ε folded in; follows from ε and is
        not saved.
      num_images: images passed so far, which is also the position in the training list;
        int32, as the other counts.
      had_defect: ring buffer over the last images that counted, bool [history]; all
        True at the start.
      num_counted: how many images entered `had_defect`.
      num_bad: images whose loss or gradient was not finite.
      bad_in_row: how many of them came last, in a row.
    """

    eps: Kernels
    momentum: Kernels
    merged: Kernels
    num_images: Any
    had_defect: Any
    num_counted: Any
    num_bad: Any
    bad_in_row: Any


def init(
    config: ViTConfig,
    params: Params,
    options: RepairOptions,
    directions: Any = None,
    factors: Factors | None = None,
) -> tuple[Frozen, RepairState]:
    """Frozen model and first state of a repair of `params`.

    Args:
      config: the architecture.
      params: the original params, finite; not changed, but on a CPU the frozen part may
        share their memory.
      options: the options of the step to come.
      directions: [L, D] defect directions in place of the computed ones; rows are
        normalized, a zero row detects nothing.
      factors: factors computed before, in place of a new SVD.

    Raises:
      ValueError: params, directions, factors or `options.first_block` that do not fit
        `config`, or values that are not finite.
    """
    param_tree.check_shapes(config, params)
    param_tree.check_finite(params)
    config.check_block(options.first_block)
    if directions is None:
        directions = defects.singular_defect_directions(config, params)
    directions = jnp.asarray(directions, jnp.float32)
    if directions.shape != (config.depth, config.embed_dim):
        raise ValueError(
            f"directions must be [{config.depth}, {config.embed_dim}], a row for each "
            f"block; got {list(directions.shape)}"
        )
    factors = factor.factorize(config, params) if factors is None else factors
    rest, stacks = kernels.split(config, params)
    factor.check_factors(stacks, factors)
    for name, tree in (("directions", directions), ("factors", factors)):
        if not all(param_tree.is_finite(np.asarray(x)) for x in jax.tree.leaves(tree)):
            raise ValueError(f"{name} hold values that are not finite")
    frozen = Frozen(
        params=jax.tree.map(jnp.asarray, rest),
        factors=jax.tree.map(jnp.asarray, factors),
        directions=loss.normalize(directions),
    )
    eps = {name: jnp.zeros(s.shape, jnp.float32) for name, s in factors.sigma.items()}
    state = RepairState(
        eps=eps,
        momentum=jax.tree.map(jnp.zeros_like, eps),
        # The step is given this memory (donation), so it must be a copy.
        merged={name: jnp.array(stack) for name, stack in stacks.items()},
        had_defect=jnp.ones(options.history, bool),
        **{name: jnp.zeros((), jnp.int32) for name in COUNTS},
    )
    return frozen, state


def to_saved(state: RepairState) -> dict[str, Any]:
    """All of a state but the merged kernels, which follow from the rest.

    ε and momentum are nested by the parts of their names, as in the params tree.
    """
    saved = {name: part for name, part in vars(state).items() if name != "merged"}
    return saved | {name: param_tree.unflatten(saved[name]) for name in TRAINED}


def from_saved(
    config: ViTConfig, params: Params, frozen: Frozen, saved: Mapping[str, Any]
) -> RepairState:
    """The state that `to_saved` took apart, bit for bit; merges its kernels anew.

    They are merged on the default device, as in the step, and kept where `frozen` is.

    Args:
      config: the architecture.
      params: the original params.
      frozen: from `init` with the factors that ε belongs to.
      saved: from `to_saved`.

    Raises:
      ValueError: ε or momentum does not fit the factors.
    """
    fields = dict(saved)
    for name in TRAINED:
        fields[name] = param_tree.flatten(saved[name])
        factor.check_eps(frozen.factors, fields[name])
    _, stacks = kernels.split(config, params)
    fields["merged"] = {name: np.array(stack) for name, stack in stacks.items()}
    factor.merge_in_place(fields["merged"], frozen.factors, fields["eps"])
    (beside,) = frozen.directions.devices()
    with jax.default_device(beside):
        return RepairState(**jax.tree.map(jnp.array, fields))


def merged_params(frozen: Frozen, state: RepairState) -> dict[str, Any]:
    """The repaired model: a params tree of host arrays with ε folded in.

    Kernels of a block whose ε is all zero, and all that is not trained, have the bits
    of the original. The arrays may be on one device, replicated or split; if they are
    split over several processes, all processes must call together.
    """
    return kernels.join(placement.gather(frozen.params), placement.gather(state.merged))
