"""Whether a model has a singular defect: what weights and photographs say together.

    tokens of all blocks, ν --look--> Look: norms, angles, outliers of every block
    Look --sighting--> Sighting: where one photograph shows the defect
    sightings --over_all--> Seen;   forecast, Seen --condition--> one of CONDITIONS

A singular defect is told from merely odd tokens by four signs at once: its tokens are
long, they lie along ν of their block, they are several in a photograph, and they do so
in many photographs. A token that has only one of the first two signs counts for
nothing here (`defective.is_defective`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sinder_jax import loss, vit
from sinder_jax.analysis.defective import (
    LARGE_NORM,
    is_defective,
    large_norms,
    norm_ratio,
)
from sinder_jax.analysis.tokens import AnyArray, angles, patch_tokens, token_norms
from sinder_jax.param_tree import Params

NOWHERE = -1
CONDITIONS = {
    "sound": "no singular defect",
    "traces": "traces of a singular defect",
    "defect": "singular defect",
}
"""The verdicts by name, the best first."""


class Look(NamedTuple):
    """One photograph's patch tokens after every block.

    Attributes:
      norms: of the tokens.
      angles: to ν of their block, in degrees.
      outliers: True for outliers along ν of their block (equation 5).
    """

    norms: Float[AnyArray, "L H W"]
    angles: Float[AnyArray, "L H W"]
    outliers: Bool[AnyArray, "L H W"]


@functools.partial(jax.jit, static_argnames=("config", "mask_thr", "window"))
def look(
    config: vit.ViTConfig,
    params: Params,
    image: Float[AnyArray, "height width 3"],
    directions: Float[AnyArray, "L D"],
    *,
    mask_thr: float = 4.0,
    window: int = 3,
) -> Look:
    """Looks at the patch tokens of one image after every block.

    Args:
      config: the architecture; static under `jax.jit`.
      params: the params tree.
      image: normalized pixels.
      directions: ν of every block.
      mask_thr: μ of the detection, see `defective.detect`.
      window: 3 or 5, likewise.

    Raises:
      ValueError: a side of the image is not a multiple of the patch size.

    Example:
      >>> from sinder_jax import defects, planted
      >>> made = planted.planted_model(0)
      >>> nu = defects.singular_defect_directions(made.config, made.params)
      >>> image = jax.random.normal(jax.random.key(0), (224, 224, 3))
      >>> found = sighting(look(made.config, made.params, image, nu), min_outliers=3)
      >>> found.block == made.block, int(found.defective[-1])
      (True, 7)
    """

    def of_block(tokens: Array, direction: Array) -> Look:
        logits = loss.outlier_logits(tokens, direction)
        mask = loss.outlier_mask(logits, mask_thr=mask_thr, window=window)
        return Look(token_norms(tokens), angles(tokens, direction), mask)

    return jax.vmap(of_block)(
        patch_tokens(config, params, image), jnp.asarray(directions)
    )


class Sighting(NamedTuple):
    """Where one photograph shows the defect; blocks count from 0, NOWHERE is none.

    Attributes:
      block, last_block: first and last of the longest run of blocks that have at least
        `min_outliers` defective tokens.
      first_outliers: the first block with at least `min_outliers` outliers, long or
        not: there a repair would act.
      patches: how many patches the photograph has.
      large: tokens with a large norm, by block.
      outliers: tokens that are outliers along ν, by block.
      defective: tokens that are defective, by block.
      norm_ratio: largest over median norm, by block.
      angle: median angle of the defective tokens of `block` to its ν, in degrees; NaN
        if there are none.
    """

    block: int
    last_block: int
    first_outliers: int
    patches: int
    large: Int[np.ndarray, " L"]
    outliers: Int[np.ndarray, " L"]
    defective: Int[np.ndarray, " L"]
    norm_ratio: Float[np.ndarray, " L"]
    angle: float


def sighting(found: Look, *, min_outliers: int = 3) -> Sighting:
    """Counts the tokens of one photograph that are long, outliers, and defective.

    Args:
      found: from `look`, or the same arrays.
      min_outliers: from so many tokens on a block has a defect.
    """
    outliers = np.asarray(found.outliers)
    large = np.asarray(large_norms(found.norms))
    defective = np.asarray(is_defective(found.norms, found.angles, outliers))
    counts = {
        name: mask.sum(axis=(1, 2))
        for name, mask in (
            ("large", large),
            ("outliers", outliers),
            ("defective", defective),
        )
    }
    block, last_block = longest_run(counts["defective"] >= min_outliers)
    stops = np.flatnonzero(counts["outliers"] >= min_outliers)
    degrees = np.asarray(found.angles)[block][defective[block]]
    return Sighting(
        block=block,
        last_block=last_block,
        first_outliers=int(stops[0]) if stops.size else NOWHERE,
        patches=outliers[0].size,
        norm_ratio=np.asarray(norm_ratio(found.norms)),
        angle=float("nan") if block == NOWHERE else float(np.median(degrees)),
        **counts,
    )


def longest_run(there: Bool[np.ndarray, " L"]) -> tuple[int, int]:
    """Returns first and last index of the longest run of True; (-1, -1) if none.

    Example:
      >>> longest_run(np.array([True, False, True, True]))
      (2, 3)
    """
    best, start = (NOWHERE, NOWHERE), 0
    for i, yes in enumerate(there):
        if not yes:
            start = i + 1
        elif best[0] == NOWHERE or i - start > best[1] - best[0]:
            best = (start, i)
    return best


class Seen(NamedTuple):
    """What all photographs show together.

    Attributes:
      photographs: how many there are.
      with_defect: how many of them show the defect in some block.
      block: in which it appears in most of these, the earlier one of equals; NOWHERE
        if no photograph shows it.
      false_alarms: photographs whose first outliers lie in front of `block`, where a
        repair would act on tokens that have no defect; 0 if there is no block.
      norm_ratio: largest over median norm by block, the largest of all photographs.
      angle: mean of the photographs' `Sighting.angle`, in degrees; NaN if no photograph
        shows the defect.
    """

    photographs: int
    with_defect: int
    block: int
    false_alarms: int
    norm_ratio: Float[np.ndarray, " L"]
    angle: float


def over_all(sightings: Sequence[Sighting]) -> Seen:
    """Puts together what at least one photograph shows."""
    showing = [each for each in sightings if each.block != NOWHERE]
    blocks, counts = np.unique([each.block for each in showing], return_counts=True)
    block = int(blocks[counts.argmax()]) if showing else NOWHERE
    stops = [each.first_outliers for each in sightings]
    return Seen(
        photographs=len(sightings),
        with_defect=len(showing),
        block=block,
        false_alarms=sum(NOWHERE < stop < block for stop in stops),
        norm_ratio=np.max([each.norm_ratio for each in sightings], axis=0),
        angle=float(np.mean([each.angle for each in showing] or [np.nan])),
    )


def condition(
    forecast: bool, photographs: int, with_defect: int, norm_ratio: float
) -> str:
    """Returns a model's condition, a name of `CONDITIONS`.

    A defect if at least half of the photographs show it, or, without photographs, if it
    is forecast. Traces if any photograph shows it, if tokens of the last block are long
    though not along ν, or if it is forecast and these photographs do not show it.

    Args:
      forecast: True if the weights alone have a defect, see `forecast.has_defect`.
      photographs: how many were looked at, or 0.
      with_defect: how many of them show a defect.
      norm_ratio: the largest over the median norm in the last block, of any photograph.

    Example:
      >>> condition(True, 16, 15, 12.0), condition(False, 16, 0, 1.4)
      ('defect', 'sound')
    """
    if 2 * with_defect >= photographs > 0 or (forecast and not photographs):
        return "defect"
    if photographs and (forecast or with_defect or norm_ratio > LARGE_NORM):
        return "traces"
    return "sound"
