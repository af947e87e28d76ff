"""The DINOv2 hub files' names.

Source: facebookresearch/dinov2, dinov2/models/vision_transformer.py, and the files.
"""

from collections.abc import Iterable

from convert.layouts.table import MASK, PATCH, TOKEN, VECTOR, Row, linear, norm


def rows(embeddings: Iterable[Row], swiglu: Iterable[Row]) -> tuple[Row, ...]:
    """The table of a layout with the hub's other names, such as timm's."""
    return (
        *embeddings,
        Row("patch_embed.proj.weight", "patch_embed/kernel", PATCH),
        Row("patch_embed.proj.bias", "patch_embed/bias", VECTOR),
        *norm("blocks.{i}.norm1", "blocks/norm1"),
        *linear("blocks.{i}.attn.qkv", "blocks/attn/qkv"),
        *linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
        Row("blocks.{i}.ls1.gamma", "blocks/ls1/gamma", VECTOR),
        *norm("blocks.{i}.norm2", "blocks/norm2"),
        *linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
        *swiglu,
        Row("blocks.{i}.ls2.gamma", "blocks/ls2/gamma", VECTOR),
        *norm("norm", "norm"),
    )


ROWS = rows(
    [
        Row("cls_token", "cls_token", TOKEN),
        Row("pos_embed", "pos_embed", TOKEN),
        Row("register_tokens", "register_tokens", TOKEN),
        Row("mask_token", "mask_token", MASK),
    ],
    [
        *linear("blocks.{i}.mlp.w12", "blocks/mlp/w12"),
        *linear("blocks.{i}.mlp.w3", "blocks/mlp/w3"),
    ],
)
