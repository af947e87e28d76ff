"""timm's names for DINOv2 (timm 1.0.31, vit_*_patch14_[reg4_]dinov2).

They are the hub's, except that a SwiGLU's w12 and w3 are called fc1 and fc2, there is
no mask token, and with registers the class token includes its position embedding.
"""

from convert.layouts import dinov2
from convert.layouts.table import TOKEN, Row, linear

ROWS = dinov2.rows(
    [
        Row("cls_token", "cls_token", TOKEN, registers=False),
        Row(
            "cls_token", "cls_token", TOKEN, plus=("pos_embed", "class"), registers=True
        ),
        Row("reg_token", "register_tokens", TOKEN),
        Row("pos_embed", "pos_embed", TOKEN, registers=False),
        Row("pos_embed", "pos_embed", TOKEN, "patches", registers=True),
    ],
    [
        *linear("blocks.{i}.mlp.fc1", "blocks/mlp/w12"),
        *linear("blocks.{i}.mlp.fc2", "blocks/mlp/w3"),
    ],
)
