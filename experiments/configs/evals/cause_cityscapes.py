r"""Unsupervised segmentation of Cityscapes by CAUSE-TR, SINDER's protocol.

    python -m experiments.evaluate --config=cause_cityscapes.py \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.data=/data/cityscapes --workdir=evals/cause_cityscapes

Source: ByungKwanLee/Causal-Unsupervised-Segmentation with its default settings;
SINDER's appendix G.2. docs/unsupervised.md says what the sources leave open.

Where 0 or an empty text stands, the number is the published one, and on the samples one
of a schedule that ends within minutes.
"""

from ml_collections import ConfigDict

from experiments.configs import evals


def get_config() -> ConfigDict:
    """The settings of CAUSE-TR on Cityscapes."""
    config = evals.unsupervised()
    config.protocol = "cause_cityscapes"
    # config.crops, empty: five; train_size and test_size 0: 322 pixels, and the same.

    # True: as the released third stage, whose labels train the head of the clusters,
    # too. False: no label reaches anything but the linear probe.
    config.label_leak = False

    # Training: a stage for the codebook, one for the head, one for the clusters.
    config.gpus = 0  # of the original; an epoch sees one's share; 0: 4, samples 1
    config.lr = 0.0  # of Adam, times gpus; 0: 0.001
    config.images_per_step = 0  # 0: 16, samples 4
    config.mediator_epochs = 0  # 0: 1
    config.front_door_epochs = 0  # 0: 2, samples 12
    config.fine_tuning_epochs = 0  # 0: 5; the learning rate is halved every second
    config.weight_decay = 0.0  # L2 in the gradients
    config.clip = 1.0  # largest norm of all gradients; 0: any
    # Two cosines of code vectors with a comma: tokens attract above the first and repel
    # below the second; empty: 0.3,0.1, samples 0.8,0.6.
    config.thresholds = ""
    config.codes = 0  # vectors of the codebook; 0: 2,048
    config.bank_size = 0  # projections kept of each code; 0: 100 (1.7 GB), samples 10
    return config
