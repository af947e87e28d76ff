r"""Linear segmentation on the last block's patch tokens, DINOv2's protocol.

    python -m experiments.evaluate --config=segmentation_linear.py \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.data=/data/ADEChallengeData2016 --workdir=evals/ade20k

Source: dinov2/eval/segmentation and the configs beside its published heads;
mmsegmentation 0.27; SINDER's appendix G.5. docs/evaluation.md has the numbers.

Where 0 or an empty text stands, the number is the published one, and on sample:mosaics
and sample:streets that of a schedule of minutes (`experiments.evaluation.schedule`).
"""

from ml_collections import ConfigDict

from experiments.configs import evals


def get_config() -> ConfigDict:
    """The settings of dinov2's linear heads."""
    config = evals.shared()
    config.protocol = "segmentation_linear"

    # Data.
    config.train_list = "train"  # of VOC2012: 1,464 images; "trainaug": with SBD's
    config.num_classes = 0  # 0: as the data set says; of own folders: largest label + 1

    # Features.
    config.blocks = 1  # the last ones, whose tokens are put side by side
    config.batch_size = 2  # images that a device takes at once

    # Training.
    config.crop = 0  # pixels of an image and of a window; 0: 512, samples 160
    config.iterations = 0  # 0: 40,000, samples 60
    config.images_per_step = 0  # 0: 16, samples 8
    config.lr = 0.0  # of AdamW; 0: 0.001, samples 0.01
    config.weight_decay = 1e-4
    config.least_ratio = 0.5  # of the short side of a training image to the crop
    config.greatest_ratio = 2.0
    config.seeds = 1  # heads, each with its own start, crops and order
    config.save_every = 1_000  # iterations

    # Inference.
    config.mode = "slide"  # windows; "whole": the image at once
    config.stride = 0  # from a window to the next; 0: 341 of 512, samples 106 of 160
    config.ratios = "1.0"  # of the short side to the crop, in order
    config.flip = False  # True: also the mirrored image
    config.raw_colors = False  # True: also a head on the pixels of each patch
    config.pictures = 4  # validation images that are drawn
    return config
