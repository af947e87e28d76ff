"""DINOv2's forward pass in PyTorch, straight on the tensors of a state dict.

    images [B, 3, height, width] --conv, positions--> tokens [B, T, D] --L blocks-->
    tokens --norm--> features [B, T, D];  weights by name, as in the file

A second opinion on a conversion: this module shares neither code nor the table of names
with the JAX model, so that agreement proves both. Importing it imports torch; `verify`
does so when there is something to compare.

It reads the layouts of the torch.hub files and of timm, which differ in:

    registers       `register_tokens`, or timm's `reg_token`
    pos_embed       1 + N rows; N in timm's models whose class token has no position,
                    or has it in `cls_token` already; 1 + R + N where registers have one
    LayerScale      `ls1.gamma`, `ls2.gamma`, or none
    SwiGLU          `mlp.w12`, `mlp.w3`, or timm's `mlp.fc1`, `mlp.fc2` of those shapes
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float

State = Mapping[str, torch.Tensor]
Tokens = Float[torch.Tensor, "B T D"]
Hidden = Float[torch.Tensor, "B T _"]  # of any width


def features(
    state_dict: State,
    images: Float[torch.Tensor, "B 3 height width"],
    *,
    num_heads: int,
    norm_epsilon: float,
) -> Tokens:
    """Tokens after the final norm: class token, registers, patches row by row.

    Args:
      state_dict: tensors by name, in the layout of the hub files or of timm; of one
        number format, in which everything is computed. Each is asked for when it is
        used, so a mapping may read or convert it then.
      images: RGB, normalized by ImageNet's mean and standard deviation, in the number
        format of the weights; of the stored grid's size, since at other sizes the
        layouts mean different functions.
      num_heads: attention heads M, which no tensor tells.
      norm_epsilon: added to the variance by every LayerNorm.

    Raises:
      KeyError: a tensor is missing.
      RuntimeError: from PyTorch, when shapes do not fit.
    """
    weights = _Weights(state_dict, num_heads, norm_epsilon)
    kernel = state_dict["patch_embed.proj.weight"]
    bias = state_dict["patch_embed.proj.bias"]
    grid = F.conv2d(images, kernel, bias, stride=kernel.shape[-1])
    tokens = _embed(state_dict, grid.flatten(2).movedim(1, -1))
    found = (re.match(r"blocks\.(\d+)\.", key) for key in state_dict)
    for i in range(1 + max((int(match[1]) for match in found if match), default=-1)):
        tokens = _block(weights, f"blocks.{i}.", tokens)
    return weights.norm("norm", tokens)


def _embed(state: State, patches: Float[torch.Tensor, "B N D"]) -> Tokens:
    positions, count = state["pos_embed"], patches.shape[1]
    registers = [state[x] for x in ("register_tokens", "reg_token") if x in state]
    own = torch.cat([state["cls_token"], *registers], dim=1)
    # The first rows, if there are more than patches: of the class token, or of all.
    own = own + F.pad(positions[:, :-count], (0, 0, 0, own.shape[1]))[:, : own.shape[1]]
    parts = [own.expand(len(patches), -1, -1), patches + positions[:, -count:]]
    return torch.cat(parts, dim=1)


# --- Blocks -----------------------------------------------------------------------


class _Weights(NamedTuple):
    """A state dict, and what its tensors do not tell."""

    state: State
    num_heads: int
    epsilon: float

    def linear(self, name: str, x: Hidden) -> Hidden:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tokens) -> Tokens:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon)

    def scale(self, name: str, x: Tokens) -> Tokens:
        has_layer_scale = "blocks.0.ls1.gamma" in self.state
        return x * self.state[f"{name}.gamma"] if has_layer_scale else x


def _block(weights: _Weights, block: str, x: Tokens) -> Tokens:
    attention = _attention(weights, block + "attn.", weights.norm(block + "norm1", x))
    x = x + weights.scale(block + "ls1", attention)
    ffn = _ffn(weights, block + "mlp.", weights.norm(block + "norm2", x))
    return x + weights.scale(block + "ls2", ffn)


def _attention(weights: _Weights, name: str, x: Tokens) -> Tokens:
    # Rows of qkv: q, k, v; within each, the head is the slow index.
    qkv = weights.linear(name + "qkv", x).unflatten(-1, (3, weights.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return weights.linear(name + "proj", mixed.transpose(1, 2).flatten(2))


def _ffn(weights: _Weights, name: str, x: Tokens) -> Tokens:
    packed = name + "w12.weight" in weights.state
    first, last = ("w12", "w3") if packed else ("fc1", "fc2")
    hidden = weights.linear(name + first, x)
    width = weights.state[f"{name}{last}.weight"].shape[1]
    if packed or hidden.shape[-1] == 2 * width:
        gate, value = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(hidden)
    return weights.linear(name + last, hidden)
