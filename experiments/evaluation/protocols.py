"""Which protocols there are: name -> the module that runs it.

A protocol is a file `experiments/configs/evals/NAME.py` with `config.protocol = "NAME"`
and every key that the protocol reads, a line in `PROTOCOLS`, and a module with two
functions:

    prepare(config, models) -> data     lists and checks, before anything is computed
    run(job) -> Result                  evaluates one model; `job.data` is that data

`prepare` is called once, with all models (their weights not read yet), and raises
ValueError or FileNotFoundError for whatever is wrong with config, data or models. `run`
is called for each model in turn, and for what each remedy makes of the first one. What
a killed run must not lose goes into `job.folder`, which belongs to this model and this
config. Features come from `images.extractor` or `images.cached`, which heed
`job.forward`: a model is not all that there is to run.
"""

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from ml_collections import ConfigDict

from experiments.evaluation.job import Job, Result
from sinder_jax.model import Model

PROTOCOLS = {
    "knn": "experiments.evaluation.knn",
    "linear": "experiments.evaluation.linear",
    "segmentation_linear": "experiments.evaluation.segmentation",
    "segmentation_multiscale": "experiments.evaluation.segmentation",
    "depth": "experiments.evaluation.depth",
    "stego_cityscapes": "experiments.evaluation.stego",
    "stego_potsdam3": "experiments.evaluation.stego",
    "cause_cityscapes": "experiments.evaluation.cause",
    "cause_voc": "experiments.evaluation.cause",
    "artifacts": "experiments.evaluation.artifacts",
}


class Module(Protocol):
    """What a protocol's module offers."""

    def prepare(self, config: ConfigDict, models: Sequence[Model]) -> Any:
        """Lists and checks the data; raises for all that is wrong."""

    def run(self, job: Job) -> Result:
        """Evaluates one model."""


def check_name(name: Any) -> str:
    """Returns the name of a protocol.

    Raises:
      ValueError: there is none of that name; suggests the nearest.
    """
    if name in PROTOCOLS:
        return name
    near = difflib.get_close_matches(str(name), PROTOCOLS, n=3, cutoff=0.5)
    known = " or ".join(near) if near else ", ".join(PROTOCOLS)
    raise ValueError(f"config.protocol: got {name!r}, expected {known}")


def module(name: str) -> Module:
    """Imports the module of a protocol."""
    return cast(Module, importlib.import_module(PROTOCOLS[name]))
