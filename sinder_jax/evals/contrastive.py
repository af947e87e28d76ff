"""CAUSE's contrastive loss: the student's tokens against the teacher's and the bank's.

    codebook --relations--> which codes attract, which repel
    student [B, n, P], teacher [B, n, P] --local, each image--> loss
    student, bank of up to K·100 keys --global, each image--> loss

Source: ByungKwanLee/Causal-Unsupervised-Segmentation modules/segment_module.py,
`contrastive_ema_with_codebook_bank`. Positive and negative are decided by the cosine of
code vectors, not by tokens; a pair in between counts nowhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sinder_jax.evals import concept_bank
from sinder_jax.evals.concept_bank import ConceptBank
from sinder_jax.evals.probes import cosines, normalize

TEMPERATURE = 0.07
BLOCK = 4_096  # keys of the bank that are compared at a time
HIGHEST = "highest"


class Thresholds(NamedTuple):
    """Cosines of two code vectors: tokens of such codes attract above, repel below.

    Attributes:
      positive: above it.
      negative: below it.
    """

    positive: float = 0.3
    negative: float = 0.1


PUBLISHED = Thresholds()


class Relations(NamedTuple):
    """How two codes relate, each [K, K]; a pair may be neither."""

    positive: Bool[Array, "K K"]
    negative: Bool[Array, "K K"]


def relations(
    codebook: Float[Array, "K D"], thresholds: Thresholds = PUBLISHED
) -> Relations:
    """Positive: cosine above the first threshold; negative: below the second."""
    similarity = cosines(codebook, codebook)
    return Relations(similarity > thresholds.positive, similarity < thresholds.negative)


def contrastive_loss(
    student: Float[Array, "B n P"],
    teacher: Float[Array, "B n P"],
    codes: Int[Array, "B n"],
    related: Relations,
    bank: ConceptBank,
) -> Float[Array, ""]:
    """Mean over the terms of all images, local ones and, with a filled bank, global.

    With s = cosine / 0.07 and the positive and negative keys of each anchor i,

        l_ij = -s_ij + log Σ_{m positive or negative} exp(s_im),

    a term is the mean of l_ij over all positive pairs (i, j) of an image. Local keys
    are the teacher's tokens of the whole batch without the anchor's own, global keys
    all of the bank. A term without positive pairs is left out; the original's becomes
    NaN there, and its loss scaler skips the step.

    Args:
      student: sampled projections, the anchors.
      teacher: likewise, aligned with them; no gradient.
      codes: of these tokens.
      related: from `relations`.
      bank: as before this step; no gradient.

    Returns:
      The loss; 0 if no image has a positive pair.
    """
    anchors = normalize(student)
    local = _local(anchors, normalize(lax.stop_gradient(teacher)), codes, related)
    global_ = _global(anchors, codes, related, bank)
    terms, pairs = (jnp.concatenate(each) for each in zip(local, global_, strict=True))
    known = pairs > 0
    return jnp.sum(jnp.where(known, terms, 0)) / jnp.maximum(jnp.sum(known), 1)


Terms = tuple[Float[Array, " B"], Float[Array, " B"]]  # of images; positive pairs


def _local(
    anchors: Float[Array, "B n P"],
    keys: Float[Array, "B n P"],
    codes: Int[Array, "B n"],
    related: Relations,
) -> Terms:
    images, n, _ = anchors.shape
    flat, every = keys.reshape(images * n, -1), codes.ravel()
    own = jnp.eye(images * n, dtype=bool).reshape(images, n, -1)
    positive = related.positive[codes[..., None], every[None, None]] & ~own
    negative = related.negative[codes[..., None], every[None, None]]
    scores = jnp.einsum("bnp,mp->bnm", anchors, flat, precision=HIGHEST) / TEMPERATURE
    pairs = jnp.sum(positive, axis=-1, dtype=jnp.float32)
    # An anchor without positives does not count; keeps its sum from being log(0).
    counted = positive | negative | (pairs == 0)[..., None]
    log_sums = jax.nn.logsumexp(scores, axis=-1, where=counted)
    near = jnp.sum(jnp.where(positive, scores, 0), axis=-1)
    return _terms(near, log_sums, pairs)


def _global(
    anchors: Float[Array, "B n P"],
    codes: Int[Array, "B n"],
    related: Relations,
    bank: ConceptBank,
) -> Terms:
    images, n, width = anchors.shape
    positive = related.positive[codes.ravel()]
    counted = positive | related.negative[codes.ravel()]
    near, log_sums = _compared(
        anchors.reshape(images * n, width), positive, counted, bank
    )
    pairs = positive.astype(jnp.float32) @ bank.counts.astype(jnp.float32)
    near, log_sums, pairs = (x.reshape(images, n) for x in (near, log_sums, pairs))
    return _terms(near, log_sums, pairs)


def _terms(
    near: Float[Array, "B n"], log_sums: Float[Array, "B n"], pairs: Float[Array, "B n"]
) -> Terms:
    """Means over positive pairs, from sums over the keys of each anchor."""
    total = jnp.sum(pairs, axis=1)
    means = jnp.sum(pairs * log_sums - near, axis=1) / jnp.maximum(total, 1)
    return means, total


# --- Keys of the bank -----------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums over the keys of the bank, for each of A anchors.

    Attributes:
      near: of the positive scores.
      log_exp: log of that of exp(score) of all that count; 0 if none does.
      near_slope, log_exp_slope: gradients of both by the anchor.
    """

    near: Float[Array, " A"]
    log_exp: Float[Array, " A"]
    near_slope: Float[Array, "A P"]
    log_exp_slope: Float[Array, "A P"]


@jax.custom_vjp
def _compared(
    anchors: Float[Array, "A P"],
    positive: Bool[Array, "A K"],
    counted: Bool[Array, "A K"],
    bank: ConceptBank,
) -> tuple[Float[Array, " A"], Float[Array, " A"]]:
    """`near` and `log_exp` of `_over_bank`, differentiable by the anchors."""
    sums = _over_bank(anchors, positive, counted, bank)
    return sums.near, sums.log_exp


def _compared_forward(*args: Any) -> Any:
    sums = _over_bank(*args)
    return (sums.near, sums.log_exp), (sums.near_slope, sums.log_exp_slope)


def _compared_backward(slopes: Any, cotangents: Any) -> Any:
    by_anchor = sum(
        cotangent[:, None] * slope
        for cotangent, slope in zip(cotangents, slopes, strict=True)
    )
    return by_anchor, None, None, None


_compared.defvjp(_compared_forward, _compared_backward)


def _over_bank(
    anchors: Float[Array, "A P"],
    positive: Bool[Array, "A K"],
    counted: Bool[Array, "A K"],
    bank: ConceptBank,
) -> _Sums:
    """One pass over the filled places of the bank, a block at a time.

    Scores are at most 1/temperature, which takes the place of the largest one in the
    sum of exponentials; so sums and gradients come out of the same pass, as in fused
    attention, and time and memory grow with what the bank holds.
    """
    codes, size, width = bank.keys.shape
    flat = bank.keys.reshape(codes * size, width)
    block = min(BLOCK, len(flat))
    places, filled = concept_bank.rows(bank)
    places = jnp.pad(places, (0, -len(places) % block))

    def add(number: Array, carry: Any) -> Any:
        exps, weighted, of_codes = carry
        rows = lax.dynamic_slice_in_dim(places, number * block, block)
        inside = number * block + jnp.arange(block) < filled
        keys = normalize(flat[rows]) * inside[:, None]
        scores = jnp.matmul(anchors, keys.T, precision=HIGHEST) / TEMPERATURE
        some = counted[:, rows // size] & inside[None, :]
        each = jnp.where(some, jnp.exp(scores - 1 / TEMPERATURE), 0)
        return (
            exps + jnp.sum(each, axis=1),
            weighted + jnp.matmul(each, keys, precision=HIGHEST),
            of_codes.at[rows // size].add(keys, indices_are_sorted=True),
        )

    start = jnp.zeros(len(anchors)), jnp.zeros(anchors.shape), jnp.zeros((codes, width))
    blocks = (filled + block - 1) // block
    exps, weighted, of_codes = lax.fori_loop(0, blocks, add, start)
    near_slope = (
        jnp.matmul(positive.astype(jnp.float32), of_codes, precision=HIGHEST)
        / TEMPERATURE
    )
    known = jnp.where(exps > 0, exps, 1)
    return _Sums(
        near=jnp.sum(anchors * near_slope, axis=1),
        log_exp=jnp.log(known) + 1 / TEMPERATURE,
        near_slope=near_slope,
        log_exp_slope=weighted / known[:, None] / TEMPERATURE,
    )
