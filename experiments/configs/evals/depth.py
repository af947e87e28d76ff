r"""Linear depth estimation on NYU Depth v2, DINOv2's protocol.

    python -m experiments.evaluate --config=depth.py --workdir=evals/nyu \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant --config.data=/data/nyu

Source: dinov2/eval/depth and the configs of its heads. SINDER's appendix has no
settings of depth. Its 0.370 m for DINOv2's giant is above what DINOv2 publishes for
four layers of the smaller L (0.333), so it is likely that of the last layer alone: the
default here. For four layers give --config.layers=4.
"""

from ml_collections import ConfigDict

from experiments.configs import evals


def get_config() -> ConfigDict:
    """The settings of dinov2's linear depth heads."""
    config = evals.shared()
    config.protocol = "depth"
    config.layers = 1  # 1: the last block; 4: four blocks spread over all
    config.batch_size = 2  # images that a device takes at once

    config.iterations = 38_400
    config.images_per_step = 16  # on all devices together; two share a loss
    config.lr = 1e-4  # of AdamW, after a warm-up of a third of the iterations
    config.loss_warm_up = 100  # first iterations, whose loss leaves the variance out
    config.min_depth = 0.001  # meters
    config.max_depth = 10.0
    config.seeds = 1  # heads, each with its own start, crops and order
    config.evaluate_every = 6_400  # iterations; 0: only after the last one
    config.save_every = 400  # iterations
    return config
