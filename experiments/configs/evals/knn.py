r"""k-NN classification of class tokens, DINOv2's protocol.

    python -m experiments.evaluate --config=knn.py --workdir=evals/knn \
        --checkpoint=dinov2_vitg14 --checkpoint=runs/giant \
        --config.data=tfds:imagenet2012

Source: dinov2/eval/knn.py; SINDER's appendix G.3.
"""

from ml_collections import ConfigDict

from experiments.configs import evals


def get_config() -> ConfigDict:
    """The settings of dinov2's k-NN."""
    config = evals.shared()
    config.protocol = "knn"
    config.resize = 256  # pixels of the short side ...
    config.image_size = 224  # ... and of the middle square that is cut out
    config.ks = "10,20,100,200"  # neighbors that vote, all in one pass
    config.temperature = 0.07  # a neighbor's vote is exp(cosine / temperature)
    return config
