r"""Unsupervised segmentation of Potsdam-3 by STEGO, SINDER's protocol.

    python -m experiments.evaluate --config=stego_potsdam3.py \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.backbone=dinov2,sinder --config.data=/data/potsdam \
        --workdir=evals/stego_potsdam3

Source: as `stego_cityscapes.py`, from which this file says what differs.
"""

from ml_collections import ConfigDict

from experiments.configs.evals import stego_cityscapes


def get_config() -> ConfigDict:
    """The settings of STEGO on Potsdam-3."""
    config = stego_cityscapes.get_config()
    config.protocol = "stego_potsdam3"
    # config.crops, empty: none. SINDER's appendix says that training images are
    # five-cropped, but the original's code does so for Cityscapes alone.
    return config
