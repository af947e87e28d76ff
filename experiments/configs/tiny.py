"""The demo: a small random model with planted defects, found and repaired on a CPU.

    python -m experiments.repair --config=tiny.py --workdir=runs/demo

Hardware: two CPU cores, under a minute. Result: 7 defective patches per photograph
become 0.25 or fewer, on the four photographs repaired on and on four others.
Source: the model is not a trained DINOv2; `sinder_jax.planted` plants its defects. The
model is written as a file in DINOv2's hub layout and loaded like any checkpoint;
directions are computed, not given.
"""

from ml_collections import ConfigDict

from experiments.configs import giant


def get_config() -> ConfigDict:
    """The giant's settings, but for four photographs and a small model."""
    config = giant.get_config()

    config.model = "planted"  # 12 blocks of width 128, SwiGLU; defect in block 5
    config.data = "sample"  # the eight photographs inside scikit-image
    config.num_images = 4  # every second photograph; the others are held out
    config.image_size = 224  # pixels; the stored grid of 16 x 16 patches
    config.read_threads = 2
    config.seed = 1  # of the planted weights, and of the probes for monte_carlo

    config.lr = 0.02  # four times the authors', for a hundred images instead of 30,000
    config.matmul_precision = "highest"
    config.max_iter = 400
    config.history = 40  # ten walks over the four photographs
    config.max_bad_steps = 10

    config.log_every = 10
    config.picture_every = 20
    config.checkpoint_every = 20
    return config
