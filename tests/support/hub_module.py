"""The modules of a DINOv2 as torch.hub builds them: names and shapes, no forward pass.

Written from facebookresearch/dinov2's definition, without the project's tables, so that
`load_state_dict(strict=True)` tests those.
"""

import torch
from torch import nn


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))


def named(**modules):
    """A module with these parts."""
    return nn.ModuleDict(modules)


def block(width, swiglu):
    hidden = 4 * width
    if swiglu:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        ffn = named(w12=nn.Linear(width, 2 * hidden), w3=nn.Linear(hidden, width))
    else:
        ffn = named(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))
    return named(
        norm1=nn.LayerNorm(width),
        attn=named(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)),
        ls1=LayerScale(width),
        norm2=nn.LayerNorm(width),
        mlp=ffn,
        ls2=LayerScale(width),
    )


class Hub(nn.Module):
    """dinov2_vit{s,b,l,g}14, with registers where `registers` is not 0."""

    def __init__(self, width, depth, swiglu, registers, positions=1 + 37**2, patch=14):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.empty(1, registers, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.patch_embed = named(proj=nn.Conv2d(3, width, patch, patch))
        self.blocks = nn.ModuleList(block(width, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
