"""One image's share of a repair step: its first defect and the gradients before it.

    tokens --while_loop over stacked blocks, no gradient--> defect block, mask, inputs
    defect --neighbor loss--> d_tokens --back through the active blocks--> ∂loss/∂ε

No block behind the defect is computed and no gradient in front of the window. The
search keeps what the last blocks computed on the way, so that the way back runs no
block a second time.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Bool, Float

from sinder_jax import loss, vit
from sinder_jax.factor import kernel_names
from sinder_jax.state import Frozen, Kernels, RepairOptions, RepairState
from sinder_jax.vit import ViTConfig


class Search(NamedTuple):
    """How far the search for the first defect came.

    Attributes:
      block: blocks run so far.
      tokens: output of the last of them [1, T, D].
      traces: ring buffer: what block i computed on the way, at i modulo its length A;
        a `vit.BlockTrace` of [A, 1, T, ...].
      mask: outliers of the last block [H, W].
      num_outliers: how many.
      found: whether they make a defect.
      finite: whether all tokens so far were finite.
    """

    block: Array
    tokens: Array
    traces: vit.BlockTrace
    mask: Array
    num_outliers: Array
    found: Array
    finite: Array


class ImageResult(NamedTuple):
    """One image's share of a step.

    Attributes:
      layer, loss, alpha, num_outliers, finite: as in `Metrics`.
      gradients: ∂loss/∂ε by kernel [L, S], zero outside the window.
      window: the blocks that the gradient is for [L].
    """

    layer: Array
    loss: Array
    alpha: Array
    num_outliers: Array
    finite: Array
    gradients: Kernels
    window: Array


def image_results(
    config: ViTConfig,
    options: RepairOptions,
    state: RepairState,
    frozen: Frozen,
    images: Float[Array, "B height width 3"],
) -> ImageResult:
    """Every image's result, stacked; one image after the other (never `vmap`)."""
    model = vit.ViT(config, precision=options.matmul_precision)
    grid = vit.patch_grid(config, *images.shape[1:3])

    def one(image):
        tokens: Any = model.apply(
            {"params": frozen.params}, image[None], method="embed"
        )
        search = _search(config, options, state, frozen, tokens, grid)
        return _result(config, options, state, frozen, search, grid)

    return lax.map(one, images)


def _search(
    config: ViTConfig,
    options: RepairOptions,
    state: RepairState,
    frozen: Frozen,
    tokens: Float[Array, "1 T D"],
    grid: tuple[int, int],
) -> Search:
    """Runs blocks until the first with a defect, or the last."""
    apply = _block_function(config, options, state, frozen)
    ring = _window_size(config, options)
    zero = jnp.zeros((), jnp.int32)

    def run(block, tokens):
        return apply(block, _at(state.eps, block), tokens, method="trace")

    def goes_on(search: Search) -> Array:
        return (search.block < config.depth) & ~search.found & search.finite

    def advance(search: Search) -> Search:
        block = search.block
        tokens, trace = run(block, search.tokens)
        traces = jax.tree.map(
            lambda kept, new: kept.at[block % ring].set(new), search.traces, trace
        )
        patches = vit.split_tokens(config, tokens, *grid)[2][0]
        logits = loss.outlier_logits(patches, frozen.directions[block])
        mask = loss.outlier_mask(
            logits, mask_thr=options.mask_thr, window=options.window
        )
        count = jnp.sum(mask)
        finite = jnp.all(jnp.isfinite(tokens))
        found = (count >= options.min_outliers) & finite
        return Search(block + 1, tokens, traces, mask, count, found, finite)

    start = Search(
        block=zero,
        tokens=tokens,
        traces=jax.tree.map(
            lambda one: jnp.zeros((ring, *one.shape), one.dtype),
            jax.eval_shape(run, zero, tokens)[1],
        ),
        mask=jnp.zeros(grid, bool),
        num_outliers=zero,
        found=jnp.zeros((), bool),
        finite=jnp.all(jnp.isfinite(tokens)),
    )
    return lax.while_loop(goes_on, advance, start)


def _result(
    config: ViTConfig,
    options: RepairOptions,
    state: RepairState,
    frozen: Frozen,
    search: Search,
    grid: tuple[int, int],
) -> ImageResult:
    """Loss and gradients at the defect, or the values of an image without one."""

    def defect():
        return _gradients(config, options, state, frozen, search, grid)

    def no_defect():
        nan = jnp.full((), jnp.nan)
        zeros = jax.tree.map(jnp.zeros_like, state.eps)
        return nan, nan, zeros, jnp.zeros(config.depth, bool)

    value, alpha, gradients, window = lax.cond(search.found, defect, no_defect)
    sound = jnp.isfinite(value)
    for gradient in gradients.values():
        sound &= jnp.all(jnp.isfinite(gradient))
    return ImageResult(
        layer=jnp.where(search.found, search.block - 1, -1),
        loss=value,
        alpha=alpha,
        num_outliers=jnp.where(search.found, search.num_outliers, 0),
        finite=search.finite & (sound | ~search.found),
        gradients=gradients,
        window=window,
    )


def _gradients(
    config: ViTConfig,
    options: RepairOptions,
    state: RepairState,
    frozen: Frozen,
    search: Search,
    grid: tuple[int, int],
) -> tuple[Array, Array, Kernels, Bool[Array, " L"]]:
    """Loss, α and ∂loss/∂ε, back from the defect through the active blocks.

    The loss takes the mask of the search: recomputed, it could flip at the threshold.
    """
    apply = _block_function(config, options, state, frozen)
    ring = _window_size(config, options)
    layer = search.block - 1
    first = jnp.maximum(layer + 1 - ring, 0)

    def neighbor_loss(tokens):
        return loss.neighbor_loss(
            vit.split_tokens(config, tokens, *grid)[2][0],
            frozen.directions[layer],
            mask_thr=options.mask_thr,
            window=options.window,
            temperature=options.temperature,
            mask=search.mask,
        )

    value_and_grad = jax.value_and_grad(neighbor_loss, has_aux=True)
    (value, aux), d_tokens = value_and_grad(search.tokens)

    def back(carry):
        block, d_tokens, gradients = carry
        trace = jax.tree.map(lambda kept: kept[block % ring], search.traces)
        d_eps, d_tokens = _back_through(apply, block, state, trace, d_tokens)
        gradients = {
            name: gradients[name].at[block].set(d_eps[name]) for name in gradients
        }
        return block - 1, d_tokens, gradients

    zeros = jax.tree.map(jnp.zeros_like, state.eps)
    _, _, gradients = lax.while_loop(
        lambda carry: carry[0] >= first, back, (layer, d_tokens, zeros)
    )
    blocks = jnp.arange(config.depth)
    return value, aux.alpha, gradients, (first <= blocks) & (blocks <= layer)


def _back_through(
    apply: Callable[..., Any],
    block: Array,
    state: RepairState,
    trace: vit.BlockTrace,
    d_out: Float[Array, "1 T D"],
) -> tuple[Kernels, Float[Array, "1 T D"]]:
    """∂loss/∂ε of a block and ∂loss/∂input, stage by stage from what it computed.

    The values of the stages are known, so that of each only the way back is left: XLA
    drops the products that would compute them again.
    """
    eps = _at(state.eps, block)
    d_eps = []

    def stage(method, d_out, *inputs, known=None):
        def value(eps, *inputs):
            return apply(block, eps, *inputs, method=method, known=known)

        _, vjp = jax.vjp(value, eps, *inputs)
        d_stage, *d_inputs = vjp(d_out)
        d_eps.append(d_stage)
        return d_inputs

    d_attended, d_ffn = stage("add", d_out, trace.attended, trace.ffn)
    (d_hidden,) = stage("contract", d_ffn, trace.hidden, known=trace.ffn)
    (d_expanded,) = stage("expand", d_hidden, trace.attended)
    d_x, d_mixed = stage("attend", d_attended + d_expanded, trace.x, trace.mixed)
    (d_qkv,) = stage("mix", d_mixed, trace.qkv)
    (d_projected,) = stage("project", d_qkv, trace.x)
    # Every ε acts in one stage; in the others its gradient is zero.
    return jax.tree.map(lambda *parts: sum(parts), *d_eps), d_x + d_projected


def _window_size(config: ViTConfig, options: RepairOptions) -> int:
    """Most blocks that one image can update."""
    return min(options.active_blocks or config.depth, config.depth)


def _block_function(
    config: ViTConfig, options: RepairOptions, state: RepairState, frozen: Frozen
) -> Callable[..., Any]:
    """apply(block, eps, *inputs, method, known): a stage of a block, or its trace.

    `known` is the FFN's output, where it has been computed before.
    """
    module = vit.Block(config, "merged", options.matmul_precision)
    factors = {f"{name}/u": u for name, u in frozen.factors.u.items()}
    factors |= {f"{name}/sigma": s for name, s in frozen.factors.sigma.items()}
    factors |= {f"{name}/v": v for name, v in frozen.factors.v.items()}
    merged = {f"{name}/kernel": kernel for name, kernel in state.merged.items()}
    last = kernel_names(config)[-1]

    def apply(block, eps, *inputs, method, known=None):
        variables = {
            "params": _nested({f"{name}/eps": e for name, e in eps.items()}),
            "merged": _nested(_at(merged, block)),
            "factors": _nested(_at(factors, block)),
            "frozen": _at(frozen.params["blocks"], block),
        }
        if known is not None:
            variables["known"] = _nested({f"{last}/y": known})
        return module.apply(variables, *inputs, method=method)

    return apply


def _at(stacked: Any, block: Array) -> Any:
    """One block's arrays out of arrays stacked over blocks."""
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, block, keepdims=False), stacked
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep="/")
