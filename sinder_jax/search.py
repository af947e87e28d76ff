"""One image's share of a repair step: its first defect and the gradients before it.

    tokens --while_loop over stacked blocks, no gradient--> defect block, mask, inputs
    defect --neighbor loss--> d_tokens --back through the active blocks--> ∂loss/∂ε

No block behind the defect is computed and no gradient in front of the window. The
search keeps what the last blocks computed on the way, so that the way back runs no
block a second time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Bool, Float

from sinder_jax import kernels, layers, loss, vit
from sinder_jax.placement import WHOLE, Placement
from sinder_jax.state import Frozen, Kernels, RepairOptions, RepairState
from sinder_jax.vit import ViTConfig

Weights = dict[str, Any]  # of one block, by collection


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
    placement: Placement = WHOLE,
) -> ImageResult:
    """Every image's result, stacked; one image after the other (never `vmap`)."""
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
    """The way of one image through the blocks, there and back.

    Where arrays are split over devices, all devices walk in step, each with an image of
    its own, and one that has arrived waits for the others.
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

    def search(self, tokens: Float[Array, "1 T D"]) -> Search:
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
        trace = jax.eval_shape(lambda block, x: self._trace(block, x), zero, tokens)[1]
        return Search(
            block=zero,
            tokens=tokens,
            traces=jax.tree.map(
                lambda one: jnp.zeros((self.window, *one.shape), one.dtype), trace
            ),
            mask=jnp.zeros(self.grid, bool),
            num_outliers=zero,
            found=jnp.zeros((), bool),
            finite=jnp.all(jnp.isfinite(tokens)),
        )

    def _goes_on(self, search: Search) -> Array:
        return (search.block < self.config.depth) & ~search.found & search.finite

    def _advance(self, weights: Weights, block: Array, search: Search) -> Search:
        """One block further."""
        options = self.options
        tokens, trace = self._apply(weights, _at(self.state.eps, block), search.tokens)
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
        count = jnp.sum(mask)
        finite = jnp.all(jnp.isfinite(tokens))
        found = (count >= options.min_outliers) & finite
        return Search(block + 1, tokens, traces, mask, count, found, finite)

    # --- And back ---------------------------------------------------------------------

    def result(self, search: Search) -> ImageResult:
        """Loss and gradients at the defect, or the values of an image without one."""

        def no_defect():
            nan = jnp.full((), jnp.nan)
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
            num_outliers=jnp.where(search.found, search.num_outliers, 0),
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
        self, search: Search, d_tokens: Float[Array, "1 T D"]
    ) -> tuple[Kernels, Bool[Array, " L"]]:
        """∂loss/∂ε, back from the defect through the active blocks; which they are."""
        depth, layer = self.config.depth, search.block - 1
        last = jnp.where(search.found, layer, -1)
        first = jnp.where(search.found, jnp.maximum(layer + 1 - self.window, 0), depth)
        until = self.placement.smallest(first)

        def step(weights, block, carry):
            d_tokens, gradients = carry
            trace = jax.tree.map(lambda kept: kept[block % self.window], search.traces)
            d_eps, d_tokens = self._back_through(weights, block, trace, d_tokens)
            return d_tokens, {
                name: gradients[name].at[block].set(d_eps[name]) for name in gradients
            }

        def body(carry):
            block, passed = carry
            active = (first <= block) & (block <= last)
            return block - 1, self._if(active, step, block, passed)

        zeros = jax.tree.map(jnp.zeros_like, self.state.eps)
        _, (_, gradients) = lax.while_loop(
            lambda carry: carry[0] >= until,
            body,
            (self.placement.largest(last), (d_tokens, zeros)),
        )
        blocks = jnp.arange(depth)
        return gradients, (first <= blocks) & (blocks <= last)

    def _back_through(
        self,
        weights: Weights,
        block: Array,
        trace: vit.BlockTrace,
        d_out: Float[Array, "1 T D"],
    ) -> tuple[Kernels, Float[Array, "1 T D"]]:
        """∂loss/∂ε of a block and ∂loss/∂input, stage by stage from what it computed.

        The values of the stages are known, so that of each only the way back is left:
        XLA drops the products that would compute them again.
        """
        eps = _at(self.state.eps, block)
        d_eps = []

        def stage(method, d_out, *inputs, known=None):
            def value(eps, *inputs):
                return self._apply(weights, eps, *inputs, method=method, known=known)

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

    # --- Blocks ---------------------------------------------------------------------

    def _if(self, condition: Array, step: Any, block: Array, passed: Any) -> Any:
        """`step` of this block, unless this device only keeps step with others."""
        weights = self._weights(block)
        if self.placement.axis is None:
            return step(weights, block, passed)
        return lax.cond(condition, lambda: step(weights, block, passed), lambda: passed)

    def _anyone(self, goes_on: Array) -> Array:
        return self.placement.largest(goes_on.astype(jnp.int32)) > 0

    def _weights(self, block: Array) -> Weights:
        """All that a block reads, whole, but its ε: collections of `vit.Block`."""
        factors = self.frozen.factors
        parts = {"u": factors.u, "sigma": factors.sigma, "v": factors.v}
        stacked = {
            "merged": {f"{name}/kernel": x for name, x in self.state.merged.items()},
            "factors": {
                f"{name}/{part}": x
                for part, by_name in parts.items()
                for name, x in by_name.items()
            },
            "frozen": self.frozen.params["blocks"],
        }
        weights = self.placement.fetch(stacked, block)
        for collection in ("merged", "factors"):
            weights[collection] = _nested(weights[collection])
        return weights

    def _trace(self, block: Array, tokens: Array) -> tuple[Array, vit.BlockTrace]:
        eps = _at(self.state.eps, block)
        return self._apply(self._weights(block), eps, tokens)

    def _apply(
        self,
        weights: Weights,
        eps: Kernels,
        *inputs: Array,
        method: str | None = None,
        known: Array | None = None,
    ) -> Any:
        """A stage of a block, or the whole block with its trace.

        `known` is the FFN's output, where it has been computed before.
        """
        module = vit.Block(
            self.config, layers.MergedDense, self.options.matmul_precision
        )
        variables = {
            "params": _nested({f"{name}/eps": e for name, e in eps.items()}),
            **weights,
        }
        if known is not None:
            last = kernels.names(self.config)[-1]
            variables["known"] = _nested({f"{last}/y": known})
        return module.apply(variables, *inputs, method=method)

    def _patches(self, tokens: Array) -> Float[Array, "H W D"]:
        return vit.split_tokens(self.config, tokens, *self.grid)[2][0]


def _at(stacked: Any, block: Array) -> Any:
    """One block's arrays out of arrays stacked over blocks, whole everywhere."""
    return WHOLE.fetch(stacked, block)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep="/")
