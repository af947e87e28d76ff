"""CAUSE-TR: the protocols `cause_cityscapes` and `cause_voc`.

    training images --tokens--> kept
    tokens --modularity--> codebook                                     1 mediator
    tokens, codebook --contrast, moving average--> head, linear probe   2 front door
    tokens, head --modularity--> clusters, linear probe                 3 fine-tuning
    validation images --head, mirrored, CRF--> clusters matched with classes

Source: ByungKwanLee/Causal-Unsupervised-Segmentation; SINDER's appendix G.2. The state
after the last step counts, in every stage: no label chooses it.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from experiments.evaluation import (
    cause_batches,
    cause_settings,
    clusterings,
    matching,
    segmenter,
    training,
    unsupervised,
)
from experiments.evaluation.cause_batches import Batch
from experiments.evaluation.cause_settings import STAGES, options, order, thresholds
from experiments.evaluation.job import Job, Result
from experiments.evaluation.scene_training import digest
from experiments.evaluation.segmenter import Counts, Segmenter
from experiments.evaluation.unsupervised import Data
from experiments.study.cache import read_arrays, write_arrays
from sinder_jax import placement
from sinder_jax.evals import cause, front_door
from sinder_jax.evals.cause_head import Head
from sinder_jax.evals.cause_optimizer import Options
from sinder_jax.evals.probes import Linear
from sinder_jax.model import Model

# cluster_miou by data and backbone at ViT-g, beside which a result is told.
PAPER: Mapping[str, Mapping[str, float]] = {
    "Cityscapes": {"dinov2": 31.4, "dinov2_reg": 33.3, "sinder": 35.6},
    "VOC2012": {"dinov2": 55.8, "dinov2_reg": 48.9, "sinder": 62.9},
}


# --- Before anything is computed ------------------------------------------------------


def prepare(config: ConfigDict, models: Sequence[Model]) -> Data:
    """Fills in the config, and lists and checks the data.

    Raises:
      FileNotFoundError: something is missing; says what is expected where.
      ValueError: a setting out of range, a mask that does not fit, too few images.
    """
    data = unsupervised.prepare(
        config, models, cause_settings.PUBLISHED[config.protocol], cause_settings.SHORT
    )
    cause_settings.check(data.config, len(data.train), models)
    return data


# --- Training -------------------------------------------------------------------------


class Trained(NamedTuple):
    """What the three stages end with.

    Attributes:
      codebook: of the first stage [K, D].
      head: the teacher's.
      linear: probe.
      clusters: [C, 90].
    """

    codebook: Float[np.ndarray, "K D"]
    head: Head
    linear: Linear
    clusters: Float[np.ndarray, "C reduced"]


class _Stages:
    """Trains the stages of one seed, one after the other.

    All is small beside the features, so the steps run on the first device; any number
    of devices gives the same bits.
    """

    def __init__(self, job: Job, tokens: Float[np.ndarray, "n h w D"], seed: int):
        self._job, self._tokens, self._seed = job, tokens, seed
        self._order = order(job.config, len(job.data.train), seed)
        self._epochs = 0  # of the stages so far

    def run(
        self,
        stage: str,
        inputs: Any,
        start: Callable[[Array], Any],
        make_step: Callable[[Options], Callable[[Any, Batch], tuple[Any, Array]]],
        result_of: Callable[[Any], Any],
    ) -> Any:
        """Trains a stage, from where an earlier start was stopped.

        Args:
          stage: one of `STAGES`.
          inputs: arrays of earlier stages that it depends on.
          start: the state before its first step, from a key.
          make_step: the step, from its optimizer.
          result_of: what of the last state is kept; snapshots are removed then, for
            those of the second stage hold its bank.

        Raises:
          FloatingPointError: it diverged.
          UnreadableImage: a mask cannot be decoded.
        """
        job, config = self._job, self._job.config
        name = f"seed{self._seed}_{stage}"
        key = {
            "seed": self._seed,
            "tokens": list(self._tokens.shape),
            "classes": job.data.num_classes,
            "training images": digest(job.data.train),
            "earlier stages": _sha256(inputs),
        }
        told = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = job.folder / f"{name}_{told[:16]}.npz"
        first, epochs = self._epochs, config[f"{stage}_epochs"]
        self._epochs += epochs
        of_start, of_steps = jax.random.split(
            jax.random.fold_in(jax.random.key(self._seed), STAGES.index(stage))
        )
        like = jax.eval_shape(lambda key: result_of(start(key)), of_start)
        if (kept := read_arrays(path)) is not None:
            return serialization.from_bytes(_zeros(like), kept["result"].tobytes())
        steps = self._order.steps
        plan = training.Plan(
            folder=job.folder / name,
            key=key,
            total=epochs * steps,
            save_every=config.save_every,
            evaluate_every=0,
            label=f"training {name.replace('_', ' ')}",
        )
        trained = training.train(
            plan,
            jax.device_put(jax.jit(start)(of_start), placement.first()),
            make_step(options(config, stage, steps)),
            functools.partial(
                self._batches, stage, first * steps, plan.total, of_steps
            ),
            _nothing,
            progress=job.progress,
            stopping=job.stopping,
        )
        result = jax.tree.map(np.asarray, result_of(trained.state))
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(result)):
            raise FloatingPointError(
                f"{plan.label} diverged, its weights are not finite: give a smaller "
                f"--config.lr than {config.lr:g}, and another --workdir"
            )
        content = np.frombuffer(serialization.to_bytes(result), np.uint8)
        write_arrays(path, {"result": content})
        shutil.rmtree(plan.folder)
        return result

    def _batches(
        self, stage: str, before: int, total: int, key: Array, first: int
    ) -> Generator[Batch, None, None]:
        """From step `first` on, of `total`; earlier stages had `before`."""
        return cause_batches.batches(
            self._job,
            self._tokens,
            self._order,
            range(before + first, before + total),
            key,
            labeled=stage != "mediator",
        )


def _sha256(tree: Any) -> str:
    told = serialization.to_bytes(jax.tree.map(np.asarray, tree))
    return hashlib.sha256(told).hexdigest()


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)


def _nothing(state: Any) -> training.Evaluation:
    """No label chooses a state."""
    del state
    return training.Evaluation({}, {})


def train(job: Job, tokens: Float[np.ndarray, "n h w D"], seed: int) -> Trained:
    """Trains the three stages of one seed; errors as `_Stages.run`."""
    config, data = job.config, job.data
    stages = _Stages(job, tokens, seed)
    _, height, width, dim = tokens.shape

    def codebook_step(options: Options) -> Any:
        step = cause.make_codebook_step(options)
        return lambda state, batch: step(state, batch.features, batch.key)

    codebook = stages.run(
        "mediator",
        (),
        lambda key: cause.init_codebook(key, config.codes, dim),
        codebook_step,
        lambda state: state.codebook,
    )
    device = jax.device_put(codebook, placement.first())

    def front_door_step(options: Options) -> Any:
        step = front_door.make_step(device, options, thresholds(config))
        return lambda state, batch: step(state, *batch)

    head, linear = stages.run(
        "front_door",
        codebook,
        lambda key: front_door.init(
            key, device, height * width, data.num_classes, bank_size=config.bank_size
        ),
        front_door_step,
        lambda state: (state.teacher.head, state.linear),
    )

    def fine_tuning_step(options: Options) -> Any:
        leak = config.label_leak
        step = cause.make_fine_tuning_step(device, options, label_leak=leak)
        return lambda state, batch: step(state, *batch)

    tuned = stages.run(
        "fine_tuning",
        (codebook, head, linear),
        lambda key: cause.init_fine_tuning(
            key, head, linear, label_leak=config.label_leak
        ),
        fine_tuning_step,
        lambda state: state.params,
    )
    return Trained(codebook, *tuned)


# --- Evaluation -----------------------------------------------------------------------


def _codes(params: Any, tokens: Array) -> Array:
    return cause.codes(*params, tokens)


def run(job: Job) -> Result:
    """Trains from every seed, and evaluates the states after the last steps."""
    job = job._replace(config=job.data.config)
    config = job.config
    train_tokens, *views = (
        unsupervised.tokens(job, split) for split in ("train", "val", "val mirrored")
    )
    labels = unsupervised.masks_of(job.data.found.val, config, config.test_size)
    of_seeds: list[Counts] = []
    shown: Sequence[np.ndarray] = ()
    for seed in range(config.seed, config.seed + config.seeds):
        found = train(job, train_tokens, seed)
        tuned = Segmenter(
            _codes,
            (found.head, found.codebook),
            found.clusters,
            found.linear,
            cause.ALPHA,
        )
        counts = segmenter.counts(job, f"seed{seed}", tuned, views, labels)
        if config.baselines:
            counts |= clusterings.counts(job, seed, train_tokens, views, labels)
        if config.pictures and not shown:
            rows = range(min(config.pictures, len(labels)))
            shown = segmenter.predictions(job, tuned, views, rows)
        of_seeds.append(counts)
    return matching.result(job, of_seeds, _evaluated(job), shown)


def _evaluated(job: Job) -> dict[str, Any]:
    """What the method has to tell, for the reader."""
    config = job.config
    steps = order(config, len(job.data.train), 0).steps
    epochs = [config[f"{stage}_epochs"] for stage in STAGES]
    told: dict[str, Any] = {}
    if backbone := unsupervised.backbone_of(job):
        told["backbone"] = backbone
        title = job.data.found.title.partition(",")[0]
        if title in PAPER:
            told["the paper's cluster_miou, ViT-g"] = PAPER[title][backbone]
    return {
        **told,
        "codes": config.codes,
        "bank": f"{config.bank_size} of each code",
        "thresholds": config.thresholds.replace(",", " and "),
        "steps of the stages": ", ".join(str(steps * each) for each in epochs),
        "images per step": config.images_per_step,
        "learning rate": f"{config.lr:g} x {config.gpus} GPUs",
        "weight decay": config.weight_decay,
        "clip": config.clip or "none",
        "label leak": (
            "yes, as in the released third stage: labels train the head of the clusters"
            if config.label_leak
            else "no: labels train the linear probe alone"
        ),
        "seeds": config.seeds,
    }
