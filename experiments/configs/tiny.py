"""The demo: a small random model with planted defects, found and repaired on a CPU.

    python -m experiments.repair --config=tiny.py --workdir=runs/demo

The model is not a trained DINOv2: its defects are planted (`sinder_jax.planted`). It is
written as a file in DINOv2's hub layout and loaded like any checkpoint; directions are
computed, not given. It is repaired on four of the photographs inside scikit-image and
measured on those and four others. Under a minute on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of the run; the same keys in all configs of this folder."""
    config = ConfigDict()

    # Model and data.
    config.model = "planted"  # 12 blocks of width 128, SwiGLU; defect in block 5
    config.checkpoint = ""  # empty: planted at the start, into the workdir
    config.interpolate_antialias = True
    config.data = "sample"  # the eight photographs inside scikit-image
    config.num_images = 4  # every second of them; the others are held out
    config.shuffle_seed = 0  # of the order; 0: as they are listed, no shuffling
    config.image_size = 224  # pixels; the stored grid of 16 x 16 patches
    config.resize = "crop"  # to the middle square; "keep": 7 shapes, one image a step
    config.images_per_step = 0  # 0: one per device
    config.read_threads = 2  # in each process that reads
    config.read_workers = 0  # processes that read; 0: threads of this one
    config.split_model = False  # True: kernels split over the devices, not copied

    # Directions.
    config.method = "analytic"
    config.num_probes = 100_000
    config.seed = 1  # of the planted weights, and of the probes for monte_carlo

    # The repair (`sinder_jax.repair.RepairOptions`).
    config.lr = 0.02  # four times the authors', for a hundred images instead of 30,000
    config.momentum = 0.9
    config.mask_thr = 4.0
    config.min_outliers = 3
    config.window = 3
    config.temperature = 0.1
    config.active_blocks = 10
    config.reduce = "sum"
    config.matmul_precision = "highest"
    config.max_iter = 400
    config.history = 40  # ten walks over the four photographs
    config.stop_share = 0.75
    config.max_bad_steps = 10

    # What is written, counted in images.
    config.log_every = 10
    config.picture_every = 20
    config.checkpoint_every = 20
    config.keep_states = 2  # the newest ones
    config.keep_every = 0  # and all whose number is a multiple of this; 0: none
    config.measure_images = 8
    config.tensorboard = False  # True: event files in the workdir, by tensorboardX
    config.wandb_project = ""  # of Weights & Biases; empty: none
    return config
