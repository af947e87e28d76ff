r"""Repair from the weights alone: no photograph is needed (docs/datafree.md).

    python -m experiments.repair --config=datafree.py --workdir=runs/datafree \
        --config.model=dinov2_vits14 --config.checkpoint=dinov2_vits14

Hardware: a laptop; half a minute for a ViT-S. Result: docs/datafree.md. Source: not the
paper's; `sinder_jax.datafree` derives it. Photographs, if given, are only looked at,
before and after.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of a data-free repair; those that giant.py has mean the same."""
    config = ConfigDict()
    config.repair = "datafree"  # which repair this is
    config.model = "dinov2_vitg14"  # "planted": the demo's, with weights of its own
    config.checkpoint = ""
    config.seed = 0  # of the demo's model
    config.price = 1.0  # of ε as large as σ; 1: as of a mean stretch e times too far

    # To look at, before and after; empty: nothing is measured or drawn.
    config.data = ""
    config.measure_images = 8
    config.image_size = 518  # pixels, the short side; demo: 224
    config.mask_thr = 4.0
    return config
