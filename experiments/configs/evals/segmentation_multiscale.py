r"""Segmentation on the last four blocks, images of several sizes: DINOv2's "+ms".

    python -m experiments.evaluate --config=segmentation_multiscale.py \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.data=/data/ADEChallengeData2016 --workdir=evals/ade20k_ms

An image of 512 x 683 pixels takes 168 windows of 644 x 644. To try things out, give
fewer ratios: --config.ratios=1.0,1.32 takes 16.

Source: as `segmentation_linear.py`, from which this file says what differs.
"""

from ml_collections import ConfigDict

from experiments.configs.evals import segmentation_linear


def get_config() -> ConfigDict:
    """The settings of dinov2's multi-scale heads."""
    config = segmentation_linear.get_config()
    config.protocol = "segmentation_multiscale"
    config.blocks = 4
    config.least_ratio = 1.0  # no image is made smaller
    config.greatest_ratio = 3.0
    # 0 of config.crop is 640 here, of config.stride 320 of 640.
    config.ratios = ""  # empty: 1.0,1.32,1.73,2.28,3.0, samples 1.0,1.32
    config.flip = True
    return config
