"""CAUSE-TR's second stage: student and teacher heads, and a bank of concepts.

    features, codebook --teacher, student--> codes --projections--> a token of each cell
    student's against teacher's and the bank's --contrastive loss--> student
    student --moving average--> teacher --half of its projections--> bank

Source: ByungKwanLee/Causal-Unsupervised-Segmentation train_front_door_tr.py. Deviations
are listed in `cause`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from sinder_jax.evals import cause_head, concept_bank, contrastive, modularity, probes
from sinder_jax.evals.cause_head import PROJECTED, REDUCED, Head
from sinder_jax.evals.cause_optimizer import Moments, Options, moments_of, update
from sinder_jax.evals.concept_bank import ConceptBank
from sinder_jax.evals.contrastive import Thresholds
from sinder_jax.evals.modularity import draw_order, sample_cells
from sinder_jax.evals.probes import Linear

KEPT = 0.99  # share of the teacher that a step keeps

Features = Float[Array, "B H W D"]
Labels = Integer[Array, "B height width"]


class Branch(NamedTuple):
    """Student or teacher: the head, and the projection of its codes."""

    head: Head
    projection: Linear


class FrontDoorState(NamedTuple):
    """What the second stage changes.

    Attributes:
      student: trained by the contrastive loss.
      teacher: moving average of it, which is used from here on.
      linear: probe of the teacher's codes, trained with labels; the others never see
        them.
      moments: Adam's, of (student, linear).
      bank: projections of earlier steps.
    """

    student: Branch
    teacher: Branch
    linear: Linear
    moments: Moments
    bank: ConceptBank


def init(
    key: Array,
    codebook: Float[Array, "K D"],
    tokens: int,
    num_classes: int,
    *,
    reduced: int = REDUCED,
    projected: int = PROJECTED,
    bank_size: int = concept_bank.SIZE,
) -> FrontDoorState:
    """A new student, a teacher that is equal to it, a probe and an empty bank.

    Args:
      key: random key.
      codebook: of the first stage.
      tokens: N of an image, of training and test alike.
      num_classes: of the linear probe.
      reduced: numbers of a code.
      projected: numbers of its projection.
      bank_size: projections kept of each code. The bank takes 4 bytes times codes ·
        bank_size · projected: 1.68 GB for 2,048 codes with the originals' sizes.
    """
    of_head, of_projection, of_linear = jax.random.split(key, 3)
    codes, dim = codebook.shape
    student = Branch(
        cause_head.init(of_head, tokens, dim, reduced),
        cause_head.init_linear(of_projection, reduced, projected),
    )
    linear = cause_head.init_linear(of_linear, reduced, num_classes)
    return FrontDoorState(
        student,
        jax.tree.map(jnp.copy, student),
        linear,
        moments_of((student, linear)),
        concept_bank.empty(codes, projected, bank_size),
    )


Step = Callable[
    [FrontDoorState, Array, Array, Array], tuple[FrontDoorState, Float[Array, "2"]]
]


def make_step(
    codebook: Float[Array, "K D"],
    options: Options,
    thresholds: Thresholds = contrastive.PUBLISHED,
) -> Step:
    """Makes `state, losses = step(state, features, labels, key)`; donates the state.

    Dropout is active in student and teacher. The bank takes the teacher's projections
    of before the update.

    Args:
      codebook: frozen, of the first stage.
      options: of the optimizer of student and probe.
      thresholds: say which codes attract and which repel.

    Returns:
      A jitted function of the state, features [B, H, W, D], integer labels [B, height,
      width] and a key. The losses are the contrastive one and the probe's, before the
      update; labels beyond the classes do not count.
    """
    related = jax.jit(contrastive.relations)(codebook, thresholds)
    learn = jax.jit(_learn, donate_argnums=0, static_argnames="options")
    # Apart: in one program, XLA would copy the bank that the loss reads before it
    # inserts, another 1.6 GB.
    insert = jax.jit(_insert, donate_argnums=0)

    def step(
        state: FrontDoorState, features: Features, labels: Labels, key: Array
    ) -> tuple[FrontDoorState, Float[Array, "2"]]:
        learning, bank = Learning(*state[:-1]), state.bank
        learning, losses, codes, projections = learn(
            learning, bank, codebook, related, features, labels, key, options=options
        )
        bank = insert(bank, codes, projections, key)
        return FrontDoorState(**learning._asdict(), bank=bank), losses

    return step


class Learning(NamedTuple):
    """A `FrontDoorState` without its bank."""

    student: Branch
    teacher: Branch
    linear: Linear
    moments: Moments


def _insert(
    bank: ConceptBank, codes: Int[Array, "B n"], projections: Array, key: Array
) -> ConceptBank:
    flat = projections.reshape(codes.size, -1)
    return concept_bank.insert(bank, codes.ravel(), flat, jax.random.split(key, 4)[3])


def _learn(
    state: Learning,
    bank: ConceptBank,
    codebook: Float[Array, "K D"],
    related: contrastive.Relations,
    features: Features,
    labels: Labels,
    key: Array,
    *,
    options: Options,
) -> tuple[Learning, Float[Array, "2"], Int[Array, "B n"], Float[Array, "B n P"]]:
    """The step but for the bank; also returns what that takes."""
    of_order, of_teacher, of_student, _ = jax.random.split(key, 4)
    order = draw_order(of_order, *features.shape[:3])
    quantized, codes = modularity.quantize(features, codebook)
    sampled_codes = sample_cells(codes[..., None], order)[..., 0]

    def outputs(branch: Branch, key: Array) -> tuple[Array, Array]:
        z = cause_head.apply(branch.head, features, quantized, key=key)
        return z, cause_head.linear(branch.projection, sample_cells(z, order))

    z_teacher, p_teacher = outputs(state.teacher, of_teacher)

    def loss(trained: tuple[Branch, Linear]) -> tuple[Array, Array]:
        student, linear = trained
        _, p_student = outputs(student, of_student)
        contrast = contrastive.contrastive_loss(
            p_student, p_teacher, sampled_codes, related, bank
        )
        probed = probes.linear_loss(linear, z_teacher, labels)
        return contrast + probed, jnp.stack([contrast, probed])

    trained = (state.student, state.linear)
    gradients, losses = jax.grad(loss, has_aux=True)(trained)
    (student, linear), moments = update(trained, gradients, state.moments, options)
    teacher = jax.tree.map(
        lambda old, new: KEPT * old + (1 - KEPT) * new, state.teacher, student
    )
    moved = Learning(student, teacher, linear, moments)
    return moved, losses, sampled_codes, p_teacher
