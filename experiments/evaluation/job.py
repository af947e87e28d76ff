"""What a protocol is given, and what it returns.

Job: config, model, data, folders, progress --a protocol's `run`--> Result
Job --features_key--> digest of all that decides the features of an image
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.evaluation.progress import Progress
from experiments.run.stopping import Stopping
from sinder_jax.evals import features
from sinder_jax.model import Model

Scores = dict[str, float]


class Forward(NamedTuple):
    """How tokens are computed.

    Attributes:
      run: see `features.extract`; None: by the model as it is.
      facts: JSON values that tell this forward pass from others of the same weights.
    """

    run: features.Run | None = None
    facts: tuple[Any, ...] = ()


AS_IT_IS = Forward()


class Job(NamedTuple):
    """One model to evaluate.

    Attributes:
      config: of the protocol.
      model: the model; its params are read when they are first asked for.
      data: what the protocol's `prepare` returned.
      folder: for what this evaluation must find again after a kill, such as the states
        of a head; belongs to this model and this config, and exists.
      cache: folder of the features, shared by evaluations.
      progress: shows how far the evaluation is.
      stopping: hears that this start is to stop, for `training.train`.
      forward: how the model is run; `images.extractor` heeds it.
      origin: the checkpoint's model, if a remedy made `model` of it, else None.
    """

    config: ConfigDict
    model: Model
    data: Any
    folder: Path
    cache: Path
    progress: Progress
    stopping: Stopping
    forward: Forward = AS_IT_IS
    origin: Model | None = None

    @property
    def features_key(self) -> str:
        """Digest of all that decides what the features of an image are."""
        return features_key(self.model, self.forward)


class Result(NamedTuple):
    """What one model got, and what is needed to tell how sure that is.

    All metrics are functions of sums over images, so a bootstrap draws images anew and
    adds up again. Where a head is trained from several seeds, each seed has sums of its
    own, and a metric is the mean over the seeds.

    Attributes:
      counts: what each image adds, [seeds, images, ...]: 1 if it is classified
        correctly, its areas of each class, its errors. One seed if nothing is trained.
      score: makes the metrics of one seed from the sum over images, [...], and the
        number of images; in the units of the paper, such as percent.
      headline: names of the metrics for the summary line and the plot, the main one
        first.
      unit: of the headline's metrics: "%", or such as "m"; empty for plain numbers.
      evaluated: what was evaluated, by name, for the reader: images, resolution of the
        masks, K, learning rate; JSON values.
      lower_is_better: True for errors; None if that differs between the metrics.
      details: more numbers by name, for results.json alone; JSON values.
      figures: pictures of what the model does, by name.
      versus: pairs of metrics to plot one over the other, instead of the headline.
      also: of other protocols that evaluated this model, by a name that goes before
        those of their metrics. The report tells the main one of each.
    """

    counts: Float[np.ndarray, "seeds images ..."]
    score: Callable[[np.ndarray, int], Scores]
    headline: tuple[str, ...]
    unit: str
    evaluated: Mapping[str, Any]
    lower_is_better: bool | None = False
    details: Mapping[str, Any] = {}
    figures: Mapping[str, Figure] = {}
    versus: tuple[tuple[str, str], ...] = ()
    also: Mapping[str, "Result"] = {}

    def parts(self) -> "dict[str, Result]":
        """This result and the others, by what goes before the names of metrics."""
        return {"": self} | {f"{name} ": other for name, other in self.also.items()}

    def metrics(self) -> Scores:
        """The metrics, each the mean over the seeds."""
        images = self.counts.shape[1]
        return mean_of([self.score(each.sum(0), images) for each in self.counts])


def mean_of(scores: list[Scores]) -> Scores:
    """The mean of each metric; NaN where one of them is NaN."""
    return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}


def features_key(model: Model, forward: Forward = AS_IT_IS) -> str:
    """Digest of weights, architecture and forward pass.

    Two models with the same weights may resample the position embedding differently.
    """
    facts = [model.digest, model.config.as_dict(), *forward.facts]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
