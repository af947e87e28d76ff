r"""Unsupervised segmentation of Pascal VOC 2012 by CAUSE-TR, SINDER's protocol.

    python -m experiments.evaluate --config=cause_voc.py \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.data=/data/VOCdevkit/VOC2012 --workdir=evals/cause_voc

As cause_cityscapes.py, but for the images: fifty crops of each, squashed to squares,
also for testing, so the numbers cannot be compared with those of whole images. The
released second stage refuses VOC for want of a clipping norm: no clipping, and the
weight decay of the other data sets, are likely but not certain.
"""

from ml_collections import ConfigDict

from experiments.configs.evals import cause_cityscapes


def get_config() -> ConfigDict:
    """The settings of CAUSE-TR on VOC."""
    config = cause_cityscapes.get_config()
    config.protocol = "cause_voc"
    config.squash = True  # config.crops, empty: super
    config.weight_decay = 1e-4
    config.clip = 0.0
    return config
