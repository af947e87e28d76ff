"""States whose every number tells which one it is."""

import numpy as np


def tree(number, size=1000):
    """A state whose every number tells which one it is."""
    return {
        "eps": {"attn": {"v": np.full((3, size), number, np.float32)}},
        "momentum": {"attn": {"v": np.full((3, size), -number, np.float32)}},
        "num_images": np.asarray(number, np.int32),
    }
