"""Settings of evaluations: one file for each protocol, and here what all share."""

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
    # Of k-NN and the linear probe; the others keep no features.
    config.cache = ""  # folder of the features; empty: features/ in the workdir
    config.cache_dtype = "float32"  # or "float16", half as large

    # Intervals.
    config.resamples = 1_000  # bootstrap over images; 0: no intervals
    config.seed = 0  # of the bootstrap, and of whatever a protocol draws
    return config
