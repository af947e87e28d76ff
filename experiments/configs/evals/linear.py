r"""Linear probe with 52 heads at once, DINOv2's protocol.

    python -m experiments.evaluate --config=linear.py --workdir=evals/linear \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.data=tfds:imagenet2012

Source: dinov2/eval/linear.py; SINDER's appendix G.4.

Where 0 stands, the number is the published one, and on sample:crops one of a schedule
that ends within minutes.
"""

from ml_collections import ConfigDict

from experiments.configs import evals


def get_config() -> ConfigDict:
    """The settings of dinov2's linear probe."""
    config = evals.shared()
    config.protocol = "linear"

    # Validation images, and the side of the training crops.
    config.resize = 0  # pixels of the short side; 0: 256, crops 128 ...
    config.image_size = 0  # ... and of the square that is cut out; 0: 224, crops 112

    # Training. The learning rate of a head is that below times images_per_step / 256.
    config.iterations = 0  # 0: 12,500, ten of the original's epochs; crops 30
    config.images_per_step = 0  # 0: 1,024 on all devices together; crops 32
    config.learning_rates = (
        "1e-5,2e-5,5e-5,1e-4,2e-4,5e-4,1e-3,2e-3,5e-3,0.01,0.02,0.05,0.1"
    )
    config.seeds = 1  # trainings, each with its own start, crops and order
    config.evaluate_every = 0  # iterations; 0: a tenth of them
    config.save_every = 250  # iterations
    return config
