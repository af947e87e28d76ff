"""How far changed blocks stretch tokens: what a data-free repair minimizes.

    θ --singular_values--> s --log_stretches--> log σ_0 of each product
                             --gains--> ‖E_bᵀν_b‖ of each changed block
    Problem, θ --objective--> J --minimize--> θ of the smallest J nearby

`datafree` makes the problems, from products of linear maps; docs/datafree.md derives J.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sinder_jax import spectral_map
from sinder_jax.spectral_map import SpectralBlock, Values

MAX_ITERATIONS = 200  # of L-BFGS in a round
FLAT = 1e-4  # norm of the gradient that ends it


class Problem(NamedTuple):
    """The objective in one round: everything that does not depend on ε; float64.

    n products G_i, from the first changed block on, each in a subspace of k dimensions.

    Attributes:
      blocks: the m changed blocks.
      sigma: of their four kernels each.
      nu: [m, D], the direction of each block.
      between: [D, D], the product of the maps between one changed block and the next.
      inputs: [D, n·k], the subspaces on the input side, before the first changed block.
      outputs: [n_b, k, D] for each changed block b, those on the output side seen from
        behind b, of the products up to the next changed block.
      ceiling: [n], log σ_m of each product before the repair, with m changed blocks.
      slack: log τ.
    """

    blocks: tuple[SpectralBlock, ...]
    sigma: tuple[Values, ...]
    nu: Any
    between: tuple[Any, ...]
    inputs: Any
    outputs: tuple[Any, ...]
    ceiling: Any
    slack: Any


def singular_values(problem: Problem, theta: Any) -> Any:
    """Returns s = σ·exp(θ), which is never negative."""
    return jax.tree.map(lambda sigma, t: sigma * jnp.exp(t), problem.sigma, theta)


def log_stretches(problem: Problem, values: Any) -> Float[Array, " n"]:
    """Returns log σ_0 of each product in its subspace, at most that of the product."""
    x, small = problem.inputs, []
    for at, outputs in enumerate(problem.outputs):
        x = spectral_map.apply(problem.blocks[at], values[at], x)
        n, k, _ = outputs.shape
        own = x[:, : n * k].reshape(-1, n, k)
        small.append(jnp.einsum("ikd,dil->ikl", outputs, own))
        if at < len(problem.between):
            x = problem.between[at] @ x[:, n * k :]
    ritz = jnp.linalg.svd(jnp.concatenate(small), compute_uv=False)
    return jnp.log(ritz[:, 0])


def gains(problem: Problem, values: Any) -> Float[Array, " m"]:
    """‖E_bᵀν_b‖ of each changed block: how far it can stretch a token along ν_b."""

    def gain(block: SpectralBlock, s: Any, nu: Any) -> Array:
        through = functools.partial(spectral_map.apply, block, s)
        (pulled,) = jax.linear_transpose(through, nu[:, None])(nu[:, None])
        return jnp.linalg.norm(pulled)

    each = zip(problem.blocks, values, problem.nu, strict=True)
    return jnp.stack([gain(*one) for one in each])


def objective(problem: Problem, theta: Any, price: Any) -> Float[Array, ""]:
    """What `datafree.repair` minimizes, with the products in their subspaces."""
    values = singular_values(problem, theta)
    stretch = log_stretches(problem, values) - problem.ceiling - problem.slack
    gain = jnp.log(gains(problem, values)) - problem.slack
    paid = jax.tree.map(
        lambda s, sigma: jnp.sum((s - sigma) ** 2) / jnp.sum(sigma**2),
        values,
        problem.sigma,
    )
    return (
        jnp.mean(jnp.maximum(stretch, 0.0) ** 2)
        + jnp.mean(jnp.maximum(gain, 0.0) ** 2)
        + price * sum(jax.tree.leaves(paid))
    )


@jax.jit
def minimize(problem: Problem, theta: Any, price: Any) -> tuple[Any, Array]:
    """θ of the smallest objective near `theta`, by L-BFGS; and its iterations."""

    def loss(theta: Any) -> Array:
        return objective(problem, theta, price)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def goes_on(carry: Any) -> Array:
        _, state, steps = carry
        gradient = optax.tree_utils.tree_get(state, "grad")
        flat = optax.tree_utils.tree_norm(gradient) < FLAT
        return (steps == 0) | ((steps < MAX_ITERATIONS) & ~flat)

    def step(carry: Any) -> Any:
        theta, state, steps = carry
        value, gradient = value_and_grad(theta, state=state)
        update, state = solver.update(
            gradient, state, theta, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(theta, update), state, steps + 1

    start = theta, solver.init(theta), jnp.zeros((), int)
    theta, _, steps = jax.lax.while_loop(goes_on, step, start)
    return theta, steps
