"""What the weights alone tell: singular values, eigenvalues, what a repair changed.

    params --kernel_spectra--> singular values of every kernel
    params --block_maps--> leading vectors, singular values and eigenvalues of each E_i
    params before and after --singular_value_changes--> learned minus original (E)

NumPy float64 on the host, one matrix per core. Works on any params, repaired or not, of
NumPy or JAX arrays. A linear map is the matrix that multiplies a column; `u` is
its output side, `v` its input side, and a singular vector has no sign.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Complex, Float

from sinder_jax import defects, kernels, linalg
from sinder_jax.linalg import TINY, Progress, by_kernel, in_parallel
from sinder_jax.param_tree import Params
from sinder_jax.vit import ViTConfig

# --- Kernels --------------------------------------------------------------------------


def kernel_spectra(
    config: ViTConfig, params: Params, *, progress: Progress | None = None
) -> dict[str, Float[np.ndarray, "L S"]]:
    """Singular values of every kernel of every block, descending.

    The squares are eigenvalues of the kernel's Gram matrix where this loses no more
    than the last eight of float64's sixteen digits; else they come from an SVD.

    Args:
      config: the architecture.
      params: the params tree.
      progress: called after each kernel.

    Returns:
      float64 by name: "attn/q", "attn/k", "attn/v", "attn/proj" and the two FFN
      kernels, "mlp/w12" and "mlp/w3" or "mlp/fc1" and "mlp/fc2".

    Example:
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> spectra = kernel_spectra(made.config, made.params)
      >>> spectra["mlp/w3"].shape, int(spectra["mlp/w3"][:, 0].argmax()) == made.block
      ((12, 128), True)
    """
    names = (*kernels.THIRDS, *kernels.names(config)[1:])

    def values(name: str, block: int) -> np.ndarray:
        return linalg.singular_values(kernels.matrix(config, params, block, name))

    found = by_kernel(values, names, config.depth, progress)
    return {name: np.stack(rows) for name, rows in found}


# --- Block maps -----------------------------------------------------------------------


class BlockMaps(NamedTuple):
    """Spectra of the linear map E_i = M·A of each single block; float64.

    Attributes:
      directions: leading left singular vectors: the layer-wise singular defect
        directions, where a block throws what triggers it; unit rows, any sign.
      triggers: leading right singular vectors: the input that triggers it.
      singular_values: descending.
      ratios: σ_0/σ_1; near 1 the two vectors are not determined.
      eigenvalues: by modulus, descending; empty rows if they were not asked for.
    """

    directions: Float[np.ndarray, "L D"]
    triggers: Float[np.ndarray, "L D"]
    singular_values: Float[np.ndarray, "L D"]
    ratios: Float[np.ndarray, " L"]
    eigenvalues: Complex[np.ndarray, "L _"]


def block_maps(
    config: ViTConfig,
    params: Params,
    *,
    eigenvalues: bool = True,
    progress: Progress | None = None,
    **fit: Any,
) -> BlockMaps:
    """Singular values, leading vectors and eigenvalues of every block map (section 2).

    Args:
      config: the architecture.
      params: the params tree.
      eigenvalues: whether to compute them; they take most of the time.
      progress: called after each block.
      **fit: method, key and num_probes of the FFN's linear fit, as for
        `defects.singular_defects`.

    Raises:
      ValueError: an unknown method, or fewer probes than D.

    Example:
      >>> from sinder_jax import planted
      >>> made = planted.planted_model(0)
      >>> maps = block_maps(made.config, made.params)
      >>> int(maps.ratios.argmax()) == made.block
      True
      >>> bool(abs(maps.directions[made.block] @ made.direction) > 0.99)
      True
    """

    def one_block(block: int) -> tuple[np.ndarray, ...]:
        matrix = defects.block_map(config, params, block, **fit)
        u, s, vt = np.linalg.svd(matrix)
        values = np.linalg.eigvals(matrix) if eigenvalues else np.zeros(0)
        by_modulus = np.argsort(-np.abs(values), kind="stable")
        return u[:, 0], vt[0], s, values[by_modulus].astype(np.complex128)

    parts = in_parallel(one_block, range(config.depth), progress)
    directions, triggers, s, values = (np.stack(x) for x in zip(*parts, strict=True))
    ratios = s[:, 0] / np.maximum(s[:, min(1, s.shape[1] - 1)], TINY)
    return BlockMaps(directions, triggers, s, ratios, values)


class Decay(NamedTuple):
    """What eigenvalues say about the decay of norms (arXiv:2502.07004, for LLMs).

    Attributes:
      share_inside: share of the eigenvalues with |λ| < 1: a token along such an
        eigenvector shrinks. From 0 to 1.
      share_negative: share with a negative real part: a block reverses a token along
        such an eigenvector, its branches outweigh the residual. From 0 to 1.
      most_negative: the smallest real part.
    """

    share_inside: Float[np.ndarray, " L"]
    share_negative: Float[np.ndarray, " L"]
    most_negative: Float[np.ndarray, " L"]


def decay(eigenvalues: Complex[np.ndarray, "L D"]) -> Decay:
    """Reads norm decay off the eigenvalues of the block maps.

    Example:
      >>> import numpy as np
      >>> found = decay(np.array([[2.0, -1.5, 0.5, 0.1 + 0.2j, 0.1 - 0.2j]]))
      >>> found.share_inside, found.share_negative, found.most_negative
      (array([0.6]), array([0.2]), array([-1.5]))
    """
    return Decay(
        np.mean(np.abs(eigenvalues) < 1, axis=1),
        np.mean(eigenvalues.real < 0, axis=1),
        np.min(eigenvalues.real, axis=1),
    )


# --- What a repair changed ------------------------------------------------------------


def singular_value_changes(
    config: ViTConfig,
    original: Params,
    repaired: Params,
    leading: int = 3,
    *,
    progress: Progress | None = None,
) -> dict[str, Float[np.ndarray, "L leading"]]:
    """Learned minus original singular values of the trainable kernels (figure 7).

    Each belongs to a pair of singular vectors of the original, as ε does: it is
    u_iᵀ·(W' − W)·v_i, which for W' = U·diag(σ + ε)·Vᵀ is ε_i even where the learned
    values come in another order than the original ones.

    Args:
      config: the architecture of both.
      original: params before the repair.
      repaired: params after it.
      leading: how many singular values of each kernel, from the largest.
      progress: called after each kernel.

    Returns:
      float64 by name, see `kernels.names`; negative where the repair shrank.

    Raises:
      ValueError: kernels of different shapes, or fewer than `leading` singular values.

    Example:
      >>> from sinder_jax import planted
      >>> from sinder_jax.remedies import clamping
      >>> made = planted.planted_model(0)
      >>> clamped = clamping.clamp_singular_values(made.config, made.params, 5.0)
      >>> changes = singular_value_changes(made.config, made.params, clamped)
      >>> round(float(changes["mlp/w3"][made.block, 0]), 1)  # from 9 to 5
      -4.0
    """
    names = kernels.names(config)
    for name in names:
        ours, theirs = (
            kernels.matrix(config, tree, 0, name).shape for tree in (original, repaired)
        )
        if ours != theirs:
            raise ValueError(
                f"the models differ: {name} is {ours} in one and {theirs} in the other"
            )

    def change(name: str, block: int) -> np.ndarray:
        before, after = (
            kernels.matrix(config, tree, block, name) for tree in (original, repaired)
        )
        u, _, v = linalg.leading_triplets(before, leading)
        return np.einsum("oi,oi->i", u, (after - before) @ v)

    found = by_kernel(change, names, config.depth, progress)
    return {name: np.stack(rows) for name, rows in found}
