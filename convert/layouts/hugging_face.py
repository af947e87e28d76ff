"""Hugging Face transformers' names: Dinov2Model and Dinov2WithRegistersModel.

`STORED` is how their files hold the tensors, `LIVE` what `model.state_dict()` returns
in transformers 5 (5.24). The two differ in attention and SwiGLU only.
"""

from collections.abc import Iterable

from convert.layouts.table import MASK, PATCH, TOKEN, VECTOR, Row, linear, norm

BLOCK = "encoder.layer.{i}"


def _rows(
    query: str, key: str, value: str, out: str, swiglu: Iterable[Row]
) -> tuple[Row, ...]:
    patches = "embeddings.patch_embeddings.projection"
    return (
        Row("embeddings.cls_token", "cls_token", TOKEN),
        Row("embeddings.mask_token", "mask_token", MASK),
        Row("embeddings.register_tokens", "register_tokens", TOKEN),
        Row("embeddings.position_embeddings", "pos_embed", TOKEN),
        Row(f"{patches}.weight", "patch_embed/kernel", PATCH),
        Row(f"{patches}.bias", "patch_embed/bias", VECTOR),
        *norm(f"{BLOCK}.norm1", "blocks/norm1"),
        *linear(f"{BLOCK}.attention.{query}", "blocks/attn/qkv", "q"),
        *linear(f"{BLOCK}.attention.{key}", "blocks/attn/qkv", "k"),
        *linear(f"{BLOCK}.attention.{value}", "blocks/attn/qkv", "v"),
        *linear(f"{BLOCK}.attention.{out}", "blocks/attn/proj"),
        Row(f"{BLOCK}.layer_scale1.lambda1", "blocks/ls1/gamma", VECTOR),
        *norm(f"{BLOCK}.norm2", "blocks/norm2"),
        *linear(f"{BLOCK}.mlp.fc1", "blocks/mlp/fc1"),
        *linear(f"{BLOCK}.mlp.fc2", "blocks/mlp/fc2"),
        *swiglu,
        Row(f"{BLOCK}.layer_scale2.lambda1", "blocks/ls2/gamma", VECTOR),
        *norm("layernorm", "norm"),
    )


STORED = _rows(
    "attention.query",
    "attention.key",
    "attention.value",
    "output.dense",
    [
        *linear(f"{BLOCK}.mlp.weights_in", "blocks/mlp/w12"),
        *linear(f"{BLOCK}.mlp.weights_out", "blocks/mlp/w3"),
    ],
)
LIVE = _rows(
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    [
        *linear(f"{BLOCK}.mlp.gate_proj", "blocks/mlp/w12", "gate"),
        *linear(f"{BLOCK}.mlp.up_proj", "blocks/mlp/w12", "up"),
        *linear(f"{BLOCK}.mlp.down_proj", "blocks/mlp/w3"),
    ],
)
