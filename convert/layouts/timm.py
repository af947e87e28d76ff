"""timm's names for DINOv2 and its relatives (timm 1.0.31, VisionTransformer).

They are the hub's, except that a SwiGLU's w12 and w3 are called fc1 and fc2 and there
is no mask token. With `no_embed_class`, as in DINOv2's own models with registers, the
class token includes its position embedding; without it, registers have positions too.
"""

from convert.layouts import dinov2
from convert.layouts.table import TOKEN, Row, linear

ROWS = dinov2.rows(
    [
        Row("cls_token", "cls_token", TOKEN, folded=False),
        Row("cls_token", "cls_token", TOKEN, plus=("pos_embed", "class"), folded=True),
        Row("reg_token", "register_tokens", TOKEN),
        Row("pos_embed", "pos_embed", TOKEN, folded=False),
        Row("pos_embed", "pos_embed", TOKEN, "patches", folded=True),
    ],
    [
        *linear("blocks.{i}.mlp.fc1", "blocks/mlp/w12"),
        *linear("blocks.{i}.mlp.fc2", "blocks/mlp/w3"),
    ],
)
