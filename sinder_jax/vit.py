"""DINOv2's vision transformer in Flax linen, as pure functions of a params tree.

    images [B, height, width, 3] --embed--> tokens [B, T, D] --L blocks--> tokens
    tokens = [class token, registers, patches], patches row by row; --norm--> Features

Checked against two sources: the model definition of facebookresearch/dinov2 (names,
order of operations) and numbers recorded from it (tests/golden). Parameters keep
DINOv2's names with the blocks stacked on a leading axis, kernels are [in, out].
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from sinder_jax import attention, families, layers, pos_embed

FFN_LAYERS = ("mlp", "swiglu")
# Fields of a `ViTConfig` that stand in for the family's value.
OWN = ("norm_epsilon", "statistics", "layer_scale")
# Tokens that have a position embedding of their own, beside the patches.
POSITIONS = ("class", "patches", "all")
Images = Float[Array, "B height width 3"]
Tokens = Float[Array, "B T D"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of a DINOv2 model.

    Attributes:
      embed_dim: width D of a token.
      depth: number of blocks L.
      num_heads: attention heads M; must divide `embed_dim`.
      ffn_layer: "mlp" (fc1, exact GELU, fc2; S, B, L) or "swiglu" (w12, w3; g).
      img_size: side in pixels of the images that fit the stored position embedding.
      patch_size: side of a patch in pixels.
      num_register_tokens: registers R between class token and patches.
      interpolate_antialias, interpolate_offset: how the model resamples the position
        embedding for other image sizes (`pos_embed`). Plain hub models: False, 0.1;
        register models: True, 0.0; the SINDER authors: True, 0.1.
      family: key of `families.FAMILIES`, which holds what the fields above leave open.
      hidden_width: FFN width F, where it is not the family's; see `hidden_dim`.
      norm_epsilon: added to the variance by every LayerNorm, where it is not the
        family's; `families.of(config)` has the value to use.
      statistics: mean and standard deviation of the images that the model was trained
        on, where they are not the family's; likewise. Becomes a `families.Statistics`.
      layer_scale: False for a model without LayerScale, where the family has it;
        likewise. The params then hold γ = 1.
      positions: which tokens have a position embedding of their own: "class", the class
        token and the patches; "all", the registers too; "patches", the patches alone:
        the params then hold -0.0 for the class token, as they do for timm's models with
        registers, whose files have the class token's part in the token itself.

    `hidden_width` to `layer_scale` are None for most models: a value that equals the
    family's becomes None, so that equal models have equal configs.

    Raises:
      ValueError: a value that no model can have.
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn_layer: str
    img_size: int = 518
    patch_size: int = 14
    num_register_tokens: int = 0
    interpolate_antialias: bool = False
    interpolate_offset: float = 0.1
    family: str = families.DEFAULT
    hidden_width: int | None = None
    norm_epsilon: float | None = None
    statistics: Sequence[Any] | None = None
    layer_scale: bool | None = None
    positions: str = "class"

    def __post_init__(self):
        family = families.named(self.family)
        if self.ffn_layer not in FFN_LAYERS:
            allowed = " or ".join(FFN_LAYERS)
            raise ValueError(f"ffn_layer must be {allowed}, got {self.ffn_layer!r}")
        for name in ("embed_dim", "depth", "num_heads", "img_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_register_tokens < 0:
            raise ValueError("num_register_tokens must not be negative")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}"
            )
        if self.img_size % self.patch_size:
            raise ValueError(
                f"img_size={self.img_size} must be a multiple of "
                f"patch_size={self.patch_size}"
            )
        if self.positions not in POSITIONS:
            allowed = " or ".join(POSITIONS)
            raise ValueError(f"positions must be {allowed}, got {self.positions!r}")
        if (self.num_register_tokens > 0) != (self.positions == "all"):
            object.__setattr__(self, "positions", "class")
        self._settle_own(family)

    def _settle_own(self, family: families.Family) -> None:
        """Checks the values that stand in for the family's; drops equal ones."""
        width, epsilon = self.hidden_width, self.norm_epsilon
        if width is not None and not (type(width) is int and width > 0):
            raise ValueError(f"hidden_width must be positive, got {width!r}")
        if epsilon is not None and not (
            type(epsilon) in (int, float) and 0 <= epsilon < families.LARGEST
        ):
            raise ValueError(f"norm_epsilon must be at least 0, got {epsilon!r}")
        if not isinstance(self.layer_scale, bool | None):
            got = self.layer_scale
            raise ValueError(f"layer_scale must be True, False or None, got {got!r}")
        if self.statistics is not None:
            statistics = families.Statistics.of(self.statistics)
            object.__setattr__(self, "statistics", statistics)
        usual = {name: getattr(family, name) for name in OWN}
        if self.ffn_layer in family.hidden_widths:
            usual["hidden_width"] = family.hidden_widths[self.ffn_layer](self.embed_dim)
        for name, value in usual.items():
            if getattr(self, name) == value:
                object.__setattr__(self, name, None)

    @property
    def own(self) -> dict[str, Any]:
        """The values that stand in for those of the family, see `families.of`."""
        values = {name: getattr(self, name) for name in OWN}
        return {name: value for name, value in values.items() if value is not None}

    def check_block(self, block: int) -> None:
        """Raises ValueError for a block that does not exist."""
        if not 0 <= block < self.depth:
            last = self.depth - 1
            raise ValueError(f"there is no block {block}: blocks are 0 to {last}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the stored position embedding."""
        return self.img_size // self.patch_size

    @property
    def num_own_positions(self) -> int:
        """Rows of the position embedding before those of the patches."""
        return 1 + self.num_register_tokens * (self.positions == "all")

    @property
    def hidden_dim(self) -> int:
        """FFN width F."""
        usual = families.of(self).hidden_widths
        return self.hidden_width or usual[self.ffn_layer](self.embed_dim)

    def as_dict(self) -> dict[str, Any]:
        """The fields to store; `ViTConfig(**config.as_dict())` equals this config.

        Leaves out the family DINOv2 and whatever is the family's: files written before
        there was anything else do not say it, and new files must have the same bytes.
        """
        fields = dataclasses.asdict(self)
        if self.family == families.DEFAULT:
            del fields["family"]
        if self.positions == "class":
            del fields["positions"]
        return {name: value for name, value in fields.items() if value is not None}


CONFIGS: dict[str, ViTConfig] = {
    name: ViTConfig(**model.fields) for name, model in families.published().items()
}
"""The published models by name, with the resampling conventions of their hub."""


class Features(NamedTuple):
    """Tokens after the final norm; patches as a grid of H rows and W columns."""

    cls: Float[Array, "B D"]
    registers: Float[Array, "B R D"]
    patches: Float[Array, "B H W D"]


def patch_grid(config: ViTConfig, height: int, width: int) -> tuple[int, int]:
    """Patch rows and columns of an image of `height` x `width` pixels.

    Raises:
      ValueError: a side is not a positive multiple of the patch size; names the nearest
        multiples.
    """
    patch = config.patch_size
    if height % patch or width % patch or not height or not width:
        near = " x ".join(_nearest_multiples(side, patch) for side in (height, width))
        raise ValueError(
            f"image of height {height} and width {width} pixels: both sides must be "
            f"multiples of {patch}; the nearest allowed are {near}"
        )
    return height // patch, width // patch


def _nearest_multiples(side: int, patch: int) -> str:
    below = side // patch * patch
    if below == side and side:
        return str(side)
    return f"{below} or {below + patch}" if below else str(patch)


class Attention(nn.Module):
    """Multi-head self-attention; channel = head · K + index within the head.

    Attributes:
      config: the architecture.
      dense: class of the layers whose kernels a repair changes. `layers.Dense` fuses q,
        k and v and keeps all weights in `params`; `layers.SpectralDense` and
        `layers.MergedDense` keep v apart and freeze all other weights.
      precision: of every matrix product.
    """

    config: ViTConfig
    dense: type[nn.Module] = layers.Dense
    precision: Any = "highest"

    def setup(self):
        """Declares the layers: q, k and v fused, or v apart from q and k."""
        width = self.config.embed_dim
        if self.dense is layers.Dense:
            self.qkv = layers.Dense(3 * width, self.precision)
        else:
            self.qk = layers.Dense(2 * width, self.precision, frozen=True)
            self.v = self.dense(width, self.precision)
        self.proj = self.dense(width, self.precision)

    def project(self, x: Tokens) -> Float[Array, "B T qkv"]:
        """Query, key and value of every token, in this order."""
        if self.dense is layers.Dense:
            return self.qkv(x)
        return jnp.concatenate([self.qk(x), self.v(x)], axis=-1)

    def mix(self, qkv: Float[Array, "B T qkv"]) -> Tokens:
        """Values averaged by the softmax of query times key, head by head."""
        heads = self.config.num_heads
        # DINOv2 fuses q, k, v in this order; heads are the slow index of a channel.
        q, k, v = rearrange(qkv, "B T (three M K) -> three B M T K", three=3, M=heads)
        mixed = attention.mix(q, k, v, self.precision)
        return rearrange(mixed, "B M T K -> B T (M K)")


class FFN(nn.Module):
    """fc2·GELU(fc1 x) with the exact erf, or SwiGLU: w3·(silu(a)·b), (a, b) = w12 x.

    Attributes as in `Attention`.
    """

    config: ViTConfig
    dense: type[nn.Module] = layers.Dense
    precision: Any = "highest"

    def setup(self):
        """Declares the layers under DINOv2's names."""
        width, hidden = self.config.embed_dim, self.config.hidden_dim
        if self.config.ffn_layer == "mlp":
            self.fc1 = self.dense(hidden, self.precision)
            self.fc2 = self.dense(width, self.precision)
        else:
            self.w12 = self.dense(2 * hidden, self.precision)
            self.w3 = self.dense(width, self.precision)

    def expand(self, x: Tokens) -> Float[Array, "B T up"]:
        """The hidden layer before its non-linearity: F wide, or 2F for SwiGLU."""
        return self.fc1(x) if self.config.ffn_layer == "mlp" else self.w12(x)

    def activate(self, hidden: Float[Array, "B T up"]) -> Float[Array, "B T F"]:
        """The activations of the hidden units."""
        if self.config.ffn_layer == "mlp":
            return nn.gelu(hidden, approximate=False)
        a, b = jnp.split(hidden, 2, axis=-1)
        return nn.silu(a) * b

    def combine(self, activations: Float[Array, "B T F"]) -> Tokens:
        """The output for given activations of the hidden units."""
        last = self.fc2 if self.config.ffn_layer == "mlp" else self.w3
        return last(activations)

    def contract(self, hidden: Float[Array, "B T up"]) -> Tokens:
        """The output of the hidden layer."""
        return self.combine(self.activate(hidden))


class BlockTrace(NamedTuple):
    """The intermediate results of a block, each the input of one of its stages.

    Attributes:
      x: the block's input.
      qkv: query, key and value.
      mixed: values averaged by attention, before the projection.
      attended: x with the attention's output added.
      hidden: the FFN's hidden layer before its non-linearity.
      ffn: the FFN's output.
    """

    x: Tokens
    qkv: Float[Array, "B T qkv"]
    mixed: Tokens
    attended: Tokens
    hidden: Float[Array, "B T up"]
    ffn: Tokens


class Block(nn.Module):
    """x += γ1·Attn(LN1 x); x += γ2·FFN(LN2 x), in six stages.

    Each stage is a method and the trace holds its input, so that the gradient can be
    taken stage by stage without running the block again.

    Attributes as in `Attention`.
    """

    config: ViTConfig
    dense: type[nn.Module] = layers.Dense
    precision: Any = "highest"

    def setup(self):
        """Declares the parts under DINOv2's names."""
        epsilon = families.of(self.config).norm_epsilon
        frozen = self.dense is not layers.Dense
        part = (self.config, self.dense, self.precision)
        self.norm1 = layers.LayerNorm(epsilon, frozen)
        self.attn, self.ls1 = Attention(*part), layers.LayerScale(frozen)
        self.norm2 = layers.LayerNorm(epsilon, frozen)
        self.mlp, self.ls2 = FFN(*part), layers.LayerScale(frozen)

    def __call__(self, x: Tokens) -> tuple[Tokens, BlockTrace]:
        """The block's output and its intermediate results."""
        qkv = self.project(x)
        mixed = self.mix(qkv)
        attended = self.attend(x, mixed)
        hidden = self.expand(attended)
        ffn = self.contract(hidden)
        trace = BlockTrace(x, qkv, mixed, attended, hidden, ffn)
        return self.add(attended, ffn), trace

    def project(self, x: Tokens) -> Float[Array, "B T qkv"]:
        """Stage 1: query, key and value of LN1 x."""
        return self.attn.project(self.norm1(x))

    def mix(self, qkv: Float[Array, "B T qkv"]) -> Tokens:
        """Stage 2: attention."""
        return self.attn.mix(qkv)

    def attend(self, x: Tokens, mixed: Tokens) -> Tokens:
        """Stage 3: projects, scales and adds to the block's input."""
        return x + self.ls1(self.attn.proj(mixed))

    def expand(self, attended: Tokens) -> Float[Array, "B T up"]:
        """Stage 4: the hidden layer of LN2 x."""
        return self.mlp.expand(self.norm2(attended))

    def contract(self, hidden: Float[Array, "B T up"]) -> Tokens:
        """Stage 5: the FFN's output."""
        return self.mlp.contract(hidden)

    def add(self, attended: Tokens, ffn: Tokens) -> Tokens:
        """Stage 6: scales and adds to the result of the attention half."""
        return attended + self.ls2(ffn)


class ViT(nn.Module):
    """DINOv2: `ViT(config).apply({"params": params}, images)` returns `Features`.

    With `spectral=True` it is the same model with every trainable kernel as
    `factor.SpectralDense`: `params` hold only s = σ + ε, the collections `factors` and
    `frozen` the rest (`factor.spectral_variables` makes all three).

    Attributes:
      config: the architecture.
      spectral: True to factor the trainable kernels.
      precision: of every matrix product. Explicit, because JAX's default is bfloat16 on
        TPU and TF32 on GPU.
    """

    config: ViTConfig
    spectral: bool = False
    precision: Any = "highest"

    def setup(self):
        """Declares the weights; `mask_token` is used in pre-training only, but kept."""
        config, width, frozen = self.config, self.config.embed_dim, self.spectral
        own = functools.partial(layers.weight, self, frozen=frozen)
        self.cls_token = own("cls_token", layers.NORMAL, (1, 1, width))
        self.mask_token = own("mask_token", layers.ZEROS, (1, width))
        positions = config.num_own_positions + config.grid_size**2
        self.pos_embed = own("pos_embed", layers.NORMAL, (1, positions, width))
        if config.num_register_tokens:
            shape = (1, config.num_register_tokens, width)
            self.register_tokens = own("register_tokens", layers.NORMAL, shape)
        self.patch_embed = layers.PatchEmbed(
            width, config.patch_size, self.precision, frozen
        )
        dense = layers.SpectralDense if self.spectral else layers.Dense
        self.blocks = Block(config, dense, self.precision)
        self.norm = layers.LayerNorm(families.of(config).norm_epsilon, frozen)

    def __call__(self, images: Images) -> Features:
        """Class token, registers and patches after the final norm.

        Args:
          images: RGB, normalized by the mean and standard deviation of the model,
            `families.of(config).statistics`; both sides multiples of the patch size.

        Raises:
          ValueError: a side is not a multiple of the patch size.
        """
        rows, columns = patch_grid(self.config, *images.shape[1:3])
        tokens, _ = self._run_blocks(self.embed(images), keep=())
        return Features(*split_tokens(self.config, self.norm(tokens), rows, columns))

    def embed(self, images: Images) -> Tokens:
        """Tokens before the first block; most models' registers have no position."""
        rows, columns = patch_grid(self.config, *images.shape[1:3])
        patches = self.patch_embed(images)
        count = self.config.num_own_positions
        own, grid = self.pos_embed[:, :count], self.pos_embed[0, count:]
        grid = pos_embed.resample(
            rearrange(grid, "(M N) D -> M N D", M=self.config.grid_size),
            rows,
            columns,
            antialias=self.config.interpolate_antialias,
            offset=self.config.interpolate_offset,
        )
        patches = patches + rearrange(grid, "H W D -> 1 (H W) D")
        extra = [self.cls_token + own[:, :1]]
        if self.config.num_register_tokens:
            registers = self.register_tokens
            extra.append(registers + own[:, 1:] if count > 1 else registers)
        extra = [jnp.repeat(token, images.shape[0], axis=0) for token in extra]
        return jnp.concatenate([*extra, patches], axis=1)

    def intermediates(
        self, images: Images, *, blocks: tuple[int, ...]
    ) -> tuple[Tokens, ...]:
        """Raw tokens after the given blocks, without the final norm.

        Args:
          images: as for `__call__`.
          blocks: indices from 0 to L-1, in any order.

        Raises:
          ValueError: a block that does not exist, or a side that does not fit.
        """
        for block in blocks:
            self.config.check_block(block)
        wanted = tuple(sorted(set(blocks)))
        _, kept = self._run_blocks(self.embed(images), keep=wanted)
        return tuple(kept[wanted.index(block)] for block in blocks)

    def _run_blocks(
        self, tokens: Tokens, *, keep: tuple[int, ...]
    ) -> tuple[Tokens, Float[Array, "kept B T D"]]:
        """Runs all blocks; also returns the tokens after those in `keep`, stacked."""
        # A block that is not kept writes to a slot past the end, which is dropped.
        slots = np.full(self.config.depth, len(keep))
        slots[list(keep)] = np.arange(len(keep))

        def body(block, carry, slot):
            x, kept = carry
            x, _ = block(x)
            if keep:
                kept = kept.at[slot].set(x, mode="drop")
            return (x, kept), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "frozen": 0, "factors": 0},
            split_rngs={"params": True},
            length=self.config.depth,
        )
        kept = jnp.zeros((len(keep), *tokens.shape), tokens.dtype)
        (tokens, kept), _ = scan(self.blocks, (tokens, kept), jnp.asarray(slots))
        return tokens, kept


def split_tokens(
    config: ViTConfig, tokens: Tokens, rows: int, columns: int
) -> tuple[Float[Array, "B D"], Float[Array, "B R D"], Float[Array, "B H W D"]]:
    """Splits tokens into class token, registers and the grid of patches."""
    first = 1 + config.num_register_tokens
    patches = rearrange(tokens[:, first:], "B (H W) D -> B H W D", H=rows, W=columns)
    return tokens[:, 0], tokens[:, 1:first], patches
