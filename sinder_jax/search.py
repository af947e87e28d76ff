"""One image's share of a repair step: its first defect and the gradients before it.

    tokens --while_loop over stacked blocks, no gradient--> defect block, mask, inputs
    defect --neighbor loss--> d_tokens --back through the active blocks--> ∂loss/∂ε

No block after the defect is computed, and no gradient before the window. The search
keeps what the last blocks computed, so that the backward pass runs no block twice.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sinder_jax import kernels, layers, loss, param_tree, vit
from sinder_jax.placement import WHOLE, Placement
from sinder_jax.state import Frozen, Kernels, RepairOptions, RepairState
from sinder_jax.vit import ViTConfig

Weights = dict[str, Any]  # of one block, by collection
Tokens = Float[Array, "1 T D"]


class Search(NamedTuple):
    """How far the search for the first defect has come.

    Attributes:
      block: blocks run so far.
      tokens: output of the last of them [1, T, D].
      traces: ring buffer: intermediate results of block i, at i modulo its length A;
        a `vit.BlockTrace` of [A, 1, T, ...].
      mask: outliers of the last block [H, W].
      found: True if they are enough to make a defect.
      finite: True if all tokens so far were finite.
    """

    block: Array
    tokens: Array
    traces: vit.BlockTrace
    mask: Array
    found: Array
    finite: Array


class ImageResult(NamedTuple):
    """One image's share of a step.

    Attributes:
      layer, loss, alpha, num_outliers, finite: as in `Metrics`.
      gradients: ∂loss/∂ε by kernel [L, S], zero outside the window.
      window: True for the blocks that the gradient is for [L].
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
    placement: Placement = WHOLE,
) -> ImageResult:
    """The results of all images, stacked; one image after the other (never `vmap`)."""
    model = vit.ViT(config, precision=options.matmul_precision)
    grid = vit.patch_grid(config, *images.shape[1:3])
    walk = _Walk(config, options, state, frozen, placement, grid)

    def one(image):
        tokens: Any = model.apply(
            {"params": frozen.params}, image[None], method="embed"
        )
        return walk.result(walk.search(tokens))

    return lax.map(one, images)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One image's search through the blocks, and the backward pass.

    If arrays are split over devices, all devices walk in step, each with an image of
    its own, and a device that has finished waits for the others.
    """

    config: ViTConfig
    options: RepairOptions
    state: RepairState
    frozen: Frozen
    placement: Placement
    grid: tuple[int, int]

    @property
    def window(self) -> int:
        """Most blocks that one image can update."""
        depth = self.config.depth
        return min(self.options.active_blocks or depth, depth)

    # --- There ---------------------------------------------------------------------

    def search(self, tokens: Tokens) -> Search:
        """Runs blocks until the first with a defect, or the last."""

        def body(carry):
            block, search, _ = carry
            search = self._if(self._goes_on(search), self._advance, block, search)
            return block + 1, search, self._anyone(self._goes_on(search))

        start = self._start(tokens)
        first = (start.block, start, self._anyone(self._goes_on(start)))
        return lax.while_loop(lambda carry: carry[2], body, first)[1]

    def _start(self, tokens: Array) -> Search:
        zero = jnp.zeros((), jnp.int32)
        trace = jax.eval_shape(lambda x: self._block(self._weights(zero), x), tokens)[1]
        return Search(
            block=zero,
            tokens=tokens,
            traces=jax.tree.map(
                lambda one: jnp.zeros((self.window, *one.shape), one.dtype), trace
            ),
            mask=jnp.zeros(self.grid, bool),
            found=jnp.zeros((), bool),
            finite=jnp.all(jnp.isfinite(tokens)),
        )

    def _goes_on(self, search: Search) -> Array:
        return (search.block < self.config.depth) & ~search.found & search.finite

    def _advance(self, weights: Weights, block: Array, search: Search) -> Search:
        """Runs one more block and looks for a defect in its output."""
        options = self.options
        tokens, trace = self._block(weights, search.tokens)
        traces = jax.tree.map(
            lambda kept, new: kept.at[block % self.window].set(new),
            search.traces,
            trace,
        )
        patches = self._patches(tokens)
        logits = loss.outlier_logits(patches, self.frozen.directions[block])
        mask = loss.outlier_mask(
            logits, mask_thr=options.mask_thr, window=options.window
        )
        finite = jnp.all(jnp.isfinite(tokens))
        found = (jnp.sum(mask) >= options.min_outliers) & finite
        if options.first_block:
            found &= block >= options.first_block
        return Search(block + 1, tokens, traces, mask, found, finite)

    # --- And back ---------------------------------------------------------------------

    def result(self, search: Search) -> ImageResult:
        """Loss and gradients at the defect, or what an image without one reports."""

        def no_defect():
            nan = jnp.full((), jnp.nan, search.tokens.dtype)
            return nan, nan, jnp.zeros_like(search.tokens)

        value, alpha, d_tokens = lax.cond(
            search.found, lambda: self._loss(search), no_defect
        )
        gradients, window = self._gradients(search, d_tokens)
        sound = jnp.isfinite(value)
        for gradient in gradients.values():
            sound &= jnp.all(jnp.isfinite(gradient))
        return ImageResult(
            layer=jnp.where(search.found, search.block - 1, -1),
            loss=value,
            alpha=alpha,
            num_outliers=jnp.where(
                search.found, jnp.sum(search.mask, dtype=jnp.int32), 0
            ),
            finite=search.finite & (sound | ~search.found),
            gradients=gradients,
            window=window,
        )

    def _loss(self, search: Search) -> tuple[Array, Array, Array]:
        """Loss, α and ∂loss/∂tokens.

        The loss takes the mask of the search: recomputed, it could flip at the
        threshold.
        """
        options = self.options

        def neighbor_loss(tokens):
            return loss.neighbor_loss(
                self._patches(tokens),
                self.frozen.directions[search.block - 1],
                mask_thr=options.mask_thr,
                window=options.window,
                temperature=options.temperature,
                mask=search.mask,
            )

        value_and_grad = jax.value_and_grad(neighbor_loss, has_aux=True)
        (value, aux), d_tokens = value_and_grad(search.tokens)
        return value, aux.alpha, d_tokens

    def _gradients(
        self, search: Search, d_tokens: Tokens
    ) -> tuple[Kernels, Bool[Array, " L"]]:
        """∂loss/∂ε by kernel, and which blocks are in the window."""
        depth, layer = self.config.depth, search.block - 1
        last = jnp.where(search.found, layer, -1)
        first = jnp.where(search.found, jnp.maximum(layer + 1 - self.window, 0), depth)
        until = self.placement.smallest(first)

        def step(weights, block, carry):
            d_tokens, gradients = carry
            trace = jax.tree.map(lambda kept: kept[block % self.window], search.traces)
            d_eps, d_tokens = self._back_through(weights, trace, d_tokens)
            set_block = functools.partial(jax.tree.map, lambda g, d: g.at[block].set(d))
            return d_tokens, set_block(gradients, d_eps)

        def body(carry):
            block, passed = carry
            active = (first <= block) & (block <= last)
            return block - 1, self._if(active, step, block, passed)

        zeros = kernels.nest(eps=jax.tree.map(jnp.zeros_like, self.state.eps))
        _, (_, gradients) = lax.while_loop(
            lambda carry: carry[0] >= until,
            body,
            (self.placement.largest(last), (d_tokens, zeros)),
        )
        flat, blocks = param_tree.flatten(gradients), jnp.arange(depth)
        by_name = {name: flat[f"{name}/eps"] for name in self.state.eps}
        return by_name, (first <= blocks) & (blocks <= last)

    def _back_through(
        self, weights: Weights, trace: vit.BlockTrace, d_out: Tokens
    ) -> tuple[Weights, Tokens]:
        """∂loss/∂ε and ∂loss/∂input of a block, stage by stage from its trace.

        The values of the stages are known, so that only the backward pass of each is
        left: XLA drops the products that would compute the values again.
        """
        d_eps = []

        def stage(method, d_out, *inputs, **known):
            def value(eps, *inputs):
                return self._block(
                    weights | known | {"params": eps}, *inputs, method=method
                )

            _, vjp = jax.vjp(value, weights["params"], *inputs)
            d_stage, *d_inputs = vjp(d_out)
            d_eps.append(d_stage)
            return d_inputs

        output = kernels.nest(y={kernels.names(self.config)[-1]: trace.ffn})
        d_attended, d_ffn = stage("add", d_out, trace.attended, trace.ffn)
        (d_hidden,) = stage("contract", d_ffn, trace.hidden, known=output)
        (d_expanded,) = stage("expand", d_hidden, trace.attended)
        d_x, d_mixed = stage("attend", d_attended + d_expanded, trace.x, trace.mixed)
        (d_qkv,) = stage("mix", d_mixed, trace.qkv)
        (d_projected,) = stage("project", d_qkv, trace.x)
        # Every ε acts in one stage; in the others its gradient is zero.
        return jax.tree.map(lambda *parts: sum(parts), *d_eps), d_x + d_projected

    # --- Blocks ---------------------------------------------------------------------

    def _if(self, condition: Array, step: Any, block: Array, passed: Any) -> Any:
        """`step` of this block, unless this device only keeps step with the others."""
        weights = self._weights(block)
        if self.placement.axis is None:
            return step(weights, block, passed)
        return lax.cond(condition, lambda: step(weights, block, passed), lambda: passed)

    def _anyone(self, goes_on: Array) -> Array:
        return self.placement.largest(goes_on.astype(jnp.int32)) > 0

    def _weights(self, block: Array) -> Weights:
        """All that a block reads, whole: the collections of `vit.Block`."""
        factors = self.frozen.factors
        stacked = {
            "merged": kernels.nest(kernel=self.state.merged),
            "factors": kernels.nest(u=factors.u, sigma=factors.sigma, v=factors.v),
            "frozen": self.frozen.params["blocks"],
        }
        eps = WHOLE.fetch(kernels.nest(eps=self.state.eps), block)
        return self.placement.fetch(stacked, block) | {"params": eps}

    def _block(
        self, weights: Weights, *inputs: Array, method: str | None = None
    ) -> Any:
        """Runs a stage of a block, or the whole block, which also returns its trace."""
        precision = self.options.matmul_precision
        block = vit.Block(self.config, layers.MergedDense, precision)
        return block.apply(weights, *inputs, method=method)

    def _patches(self, tokens: Array) -> Float[Array, "H W D"]:
        return vit.split_tokens(self.config, tokens, *self.grid)[2][0]
