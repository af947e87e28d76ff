"""Settings of evaluations: one file for each protocol, and here what several share."""

from ml_collections import ConfigDict


def shared() -> ConfigDict:
    """Settings of every protocol."""
    config = ConfigDict()
    config.protocol = ""  # a key of `experiments.evaluation.protocols.PROTOCOLS`
    config.data = ""  # docs/evaluation.md says what is expected where

    # Features.
    config.batch_size = 32  # images that a device takes at once
    config.read_threads = 4
    config.read_workers = 0  # processes that read; 0: threads of this one
    config.matmul_precision = "highest"  # float32; "high": TF32 on a GPU
    # Of protocols that keep features: not linear segmentation, not depth.
    config.cache = ""  # folder of the features; empty: features/ in the workdir
    config.cache_dtype = "float32"  # or "float16", half as large

    # Of the first checkpoint, with commas: clamping, ablation, data-free, test-time
    # registers. Each makes a row of its own; docs/remedies.md says what they do.
    config.remedies = ""
    config.gamma = 0.0  # for clamping: the largest singular value left
    config.remedy_images = 8  # photographs that test-time registers read
    config.remedy_data = ""  # where they are; labels are not needed

    # Intervals.
    config.resamples = 1_000  # bootstrap over images; 0: no intervals
    config.seed = 0  # of the bootstrap, and of whatever a protocol draws
    return config


def unsupervised() -> ConfigDict:
    """Settings of the protocols that find clusters in patch tokens.

    Where 0 or an empty text stands, the number is the published one, and on the samples
    one of a schedule that ends within minutes.
    """
    config = shared()
    # What a checkpoint counts as: dinov2, dinov2_reg or sinder; one for all, or one for
    # each with commas.
    config.backbone = ""
    config.num_classes = 0  # 0: as the data set says; of own folders: largest label + 1
    config.train_list = "train"  # of VOC2012

    # Images are squares: scaled and cut, or squashed, without interpolation.
    config.crops = ""  # of a training image: "five", "super" (50) or "none"
    config.train_size = 0  # pixels of a side
    config.test_size = 0
    config.squash = False  # True: resized to a square, whatever the aspect
    config.batch_size = 8  # images that a device takes at once

    # Evaluation.
    config.crf = True  # False: no dense CRF; results without it are always told, too
    config.baselines = False  # True: also k-means of tokens and of colors
    config.seeds = 1  # trainings, each with its own start and order
    config.save_every = 200  # steps
    config.pictures = 4  # validation images that are drawn
    return config
