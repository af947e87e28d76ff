r"""One meter for every remedy: how defective tokens are, and what a remedy damaged.

    python -m experiments.evaluate --config=artifacts.py --workdir=evals/artifacts \
        --checkpoint=runs/planted/planted.safetensors --checkpoint=runs/planted \
        --config.data=sample:crops --config.remedies="ablation,test-time registers"

The first checkpoint is the original; docs/remedies.md says what each number is.
"""

from ml_collections import ConfigDict

from experiments.configs import evals


def get_config() -> ConfigDict:
    """The settings of the meter."""
    config = evals.shared()
    config.protocol = "artifacts"
    config.image_size = 518  # pixels of the middle square, as in the paper; demo: 224
    config.batch_size = 4  # images that a device takes at once
    config.num_images = 64  # measured, spread evenly over the data
    config.mask_thr = 4.0  # outlier along ν: so many standard deviations, as in giant
    # config.remedy_data, empty: config.data. Photographs that remedies read are not
    # measured.
    config.truth = ""  # the model before a defect was planted, if there is one

    # Data as for knn.py and segmentation_linear.py, which then evaluate each row, too,
    # with the settings of these files; empty: they do not.
    config.knn = ""
    config.segmentation = ""
    return config
