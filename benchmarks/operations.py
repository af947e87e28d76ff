"""Counts the floating-point operations of a repair step from the shapes.

    config, tokens, block of the defect --> GFLOP of our step, of the authors'

A multiplication and an addition count as two; only matrix products count. The tests
compare the counts with PyTorch's own counter.
"""

from typing import NamedTuple

from sinder_jax import vit


class Step(NamedTuple):
    """GFLOP of the parts of our step.

    Attributes:
      search: forward through the blocks up to the defect.
      inputs: gradients with respect to the inputs of the active blocks, including
        attention weights computed again.
      eps: gradients with respect to ε.
      merge: rebuilding the kernels of the active blocks, once for all images.
    """

    search: float
    inputs: float
    eps: float
    merge: float

    @property
    def total(self) -> float:
        """The whole step, for one image."""
        return sum(self)


class _Block(NamedTuple):
    """Shapes of a block's trainable kernels and the GFLOP of its parts."""

    kernels: tuple[tuple[int, int], ...]  # (in, out) of v, proj, and the two of the FFN
    qk: float
    attention: float  # one of its two products


def _block(config: vit.ViTConfig, tokens: int) -> _Block:
    width, hidden = config.embed_dim, config.hidden_dim
    up = 2 * hidden if config.ffn_layer == "swiglu" else hidden
    kernels = ((width, width), (width, width), (width, up), (hidden, width))
    return _Block(
        kernels, _product(tokens, width, 2 * width), _product(tokens, tokens, width)
    )


def _product(rows: int, inner: int, columns: int) -> float:
    return 2 * rows * inner * columns / 1e9


def our_step(
    config: vit.ViTConfig, tokens: int, block: int, active_blocks: int = 10
) -> Step:
    """Our step for one image whose first defect is in `block`.

    Args:
      config: the architecture.
      tokens: T, class token and registers included.
      block: from 0.
      active_blocks: as in `repair.RepairOptions`.
    """
    part = _block(config, tokens)
    active = min(active_blocks, block + 1)
    dense = sum(_product(tokens, *kernel) for kernel in part.kernels) + part.qk
    merge = sum(_product(i, min(i, o), o) for i, o in part.kernels)
    # Both sides of a square kernel; twice the short side of any other.
    eps = sum(2 * _product(tokens, min(i, o), min(i, o)) for i, o in part.kernels)
    return Step(
        search=(block + 1) * (dense + 2 * part.attention),
        inputs=active * (dense + 5 * part.attention),
        eps=active * eps,
        merge=active * merge,
    )


def authors_step(config: vit.ViTConfig, tokens: int, block: int) -> float:
    """GFLOP of the authors' step: rebuilds and differentiates every block it runs."""
    part = _block(config, tokens)
    width = config.embed_dim
    dense = sum(_product(tokens, *kernel) for kernel in part.kernels) + part.qk

    def rebuild(width_in: int, width_out: int) -> float:
        size = min(width_in, width_out)
        return _product(width_out, size, size) + _product(width_out, size, width_in)

    trained = sum(rebuild(*kernel) for kernel in part.kernels)
    forward = dense + 2 * part.attention + trained + 2 * rebuild(width, width)
    # Gradients of inputs and kernels, q and k included, then through the rebuilding.
    backward = 2 * dense + 4 * part.attention + trained
    return (block + 1) * (forward + backward)
