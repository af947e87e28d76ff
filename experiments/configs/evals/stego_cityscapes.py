r"""Unsupervised segmentation of Cityscapes by STEGO, SINDER's protocol.

    python -m experiments.evaluate --config=stego_cityscapes.py \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.backbone=dinov2,sinder --config.data=/data/cityscapes \
        --workdir=evals/stego_cityscapes

Source: mhamilton723/STEGO and its configs; SINDER's appendix G.1 and Table 7.
docs/unsupervised.md says what the sources leave open.

Where 0 or an empty text stands, the number is the published one, and on the samples one
of a schedule that ends within minutes.
"""

from ml_collections import ConfigDict

from experiments.configs import evals


def get_config() -> ConfigDict:
    """The settings of STEGO on Cityscapes."""
    config = evals.unsupervised()
    config.protocol = "stego_cityscapes"
    # config.backbone must be given: it picks the row of Table 7.

    # config.crops, empty: five; train_size 0: 392 pixels; test_size 0: 560. On the
    # samples: none, 224 and 224.
    # The loss. Three numbers with commas replace those of Table 7: of the negatives, of
    # the neighbors (pos inter), of an image with itself (pos intra).
    config.weights = ""
    config.shifts = ""  # samples: 0.8,0.65,0.95, since Table 7's suit no small model
    config.pointwise = True  # False: no centering of the features' cosine
    config.samples = 11  # places along a side of an image that are compared
    config.dropout = 0.1  # of the features' channels

    # Training.
    config.dim = 70  # of the codes
    config.iterations = 0  # 0: 5,000, samples 200
    config.images_per_step = 0  # 0: 16, samples 8, and a neighbor each
    config.lr = 0.0  # of Adam, of the head; 0: 0.0005, samples 0.002
    config.probe_lr = 0.0  # of both probes; 0: 0.005, samples 0.015
    return config
