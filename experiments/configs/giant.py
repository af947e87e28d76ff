r"""SINDER on DINOv2 ViT-g: the authors' settings.

    python -m experiments.repair --config=giant.py --workdir=runs/giant \
        --config.checkpoint=dinov2_vitg14 --config.data=/data/imagenet/train

Hardware: kernels, factors and the rest of the state take 9.2 GiB in float32, without
activations (benchmarks/README.md). Hours and result: never run on the published weights
here; the authors used at most 30,000 images. Source: arXiv:2407.16826 and its released
code.

`python -m convert to-jax dinov2_vitg14_pretrain.pth dinov2_vitg14` makes the
checkpoint. The data are any folder of photographs; the authors took ImageNet's training
set. The other configs of this folder start from this one.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of a run."""
    config = ConfigDict()

    # Model and data.
    config.model = "dinov2_vitg14"  # a published name; the checkpoint must match it
    config.checkpoint = ""  # from `python -m convert to-jax`, or a hub file itself
    config.interpolate_antialias = True  # the authors'; plain hub models say False
    # A folder, gs://…, list:FILE, tfds:NAME[/SPLIT] (tfds:imagenet2012), "sample": the
    # photographs in scikit-image, or "sample:crops"; see `sinder_jax.data.listing`.
    config.data = ""
    config.num_images = 30_000  # every max(1, files // num_images)-th file is used
    config.shuffle_seed = 0  # of the order; 0: as they are listed, no shuffling
    config.image_size = 518  # pixels, the short side
    config.resize = "crop"  # to the middle square; "keep": 7 shapes, one image per step
    config.images_per_step = 0  # 0: one per device; with 1 it is the authors' step
    config.read_threads = 4  # in each process that reads
    config.read_workers = 0  # processes that read; 0: threads of this one
    config.split_model = False  # True: kernels split over the devices, not copied

    # Before the repair: "on" ends the run if the model has no singular defect.
    config.diagnose = "on"  # "off": repairs whatever there is
    # "4" plants a defect in block 4 of the checkpoint first, to test the repair by the
    # truth; see `sinder_jax.planted`. Empty: the checkpoint as it is.
    config.plant = ""

    # Directions.
    config.method = "analytic"  # or "monte_carlo", the authors' way
    config.num_probes = 100_000  # per block, for monte_carlo
    config.seed = 0  # of the probes, and of a planted defect

    # The repair (`sinder_jax.repair.RepairOptions`).
    config.lr = 0.005  # SGD; ε is in units of the singular values
    config.momentum = 0.9
    config.mask_thr = 4.0  # outlier: |cos| this many standard deviations above the mean
    config.min_outliers = 3  # with fewer a block has no defect
    config.window = 3  # neighbors of a patch: 3 x 3 or 5 x 5
    config.temperature = 0.1  # τ of the learning target
    # Defects are looked for from this block on, by the authors in all; -1, on the
    # command line also auto: from the diagnosed block on (docs/analysis.md).
    config.first_block = 0
    config.active_blocks = 10  # blocks updated: the defect's and those before; 0: all
    config.reduce = "sum"  # over the images of a step whose window has the block
    config.matmul_precision = "high"  # the authors' TF32 on a GPU; "highest": float32
    config.max_iter = 30_000  # images
    config.history = 1_000  # last images that the stopping rule looks at ...
    config.stop_share = 0.75  # ... and the share of them without a defect that ends it
    config.max_bad_steps = 100  # non-finite images in a row that end the run

    # Output, counted in images.
    config.log_every = 100
    config.picture_every = 1_000
    config.checkpoint_every = 500
    config.keep_states = 2  # the newest ones
    config.keep_every = 0  # and all whose number is a multiple of this; 0: none
    config.measure_images = 8  # of each kind, for the summary: repaired on, held out
    config.tensorboard = False  # True: event files in the workdir, by tensorboardX
    config.wandb_project = ""  # of Weights & Biases; empty: none
    return config
