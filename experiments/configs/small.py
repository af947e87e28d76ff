r"""SINDER on DINOv2 ViT-S, with the authors' settings for the giant.

    python -m experiments.repair --config=small.py --workdir=runs/small \
        --config.checkpoint=dinov2_vits14 --config.data=/data/imagenet/train

Hardware: any JAX device; kernels and factors are far smaller than the giant's. Hours
and result: not run on the published weights; nothing here is tuned for this size.
Source: arXiv:2407.16826, whose authors repaired the giant only.

`python -m convert to-jax dinov2_vits14_pretrain.pth dinov2_vits14` makes the
checkpoint. For the model with registers give its checkpoint and
--config.model=dinov2_vits14_reg.
"""

from ml_collections import ConfigDict

from experiments.configs import giant


def get_config() -> ConfigDict:
    """The giant's settings, for another model."""
    config = giant.get_config()
    config.model = "dinov2_vits14"
    return config
