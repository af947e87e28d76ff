"""Trains a head, and resumes exactly: a kill changes no bit of the result.

    state, batch 0, batch 1, ... --step--> state --evaluate--> what it is worth
    FOLDER/00000250, 00000500, ...         state and evaluations after so many steps

Batch k must depend on k alone, so a training that resumes after k steps sees the same
batches as one that was never stopped. Snapshots are those of a repair
(`storage.snapshots`): an incomplete or damaged one is never resumed from.
"""

import json
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import serialization

from experiments.evaluation.progress import Progress
from experiments.run.stopping import Stopped, Stopping
from sinder_jax import cli
from sinder_jax.checkpoint import Newest
from sinder_jax.storage.errors import DamagedError
from sinder_jax.storage.snapshots import Snapshots

State = TypeVar("State")
Batch = TypeVar("Batch")
Summary = dict[str, float | None]


class Evaluation(NamedTuple):
    """What a state is worth.

    Attributes:
      summary: numbers by name, to be kept for every evaluation of a training.
      arrays: by name, not empty, kept for the last evaluation only; such as what each
        image adds to a metric.
    """

    summary: Mapping[str, float]
    arrays: Mapping[str, np.ndarray]


class Plan(NamedTuple):
    """How long to train, and what to keep.

    Attributes:
      folder: of the snapshots; made if it does not exist.
      key: everything that the result depends on, as JSON values. A folder with another
        key is refused.
      total: steps.
      save_every: steps from one snapshot to the next.
      evaluate_every: likewise; 0: only after the last step, which is always evaluated.
      label: names the training for the reader.
    """

    folder: Path
    key: Mapping[str, Any]
    total: int
    save_every: int
    evaluate_every: int
    label: str


class Trained(NamedTuple):
    """The end of a training.

    Attributes:
      state: after the last step.
      history: summaries of all evaluations, by the number of steps before each.
      arrays: of the last evaluation.
    """

    state: Any
    history: dict[int, Summary]
    arrays: dict[str, np.ndarray]


class Unusable(ValueError):
    """A folder's states are of another training, or damaged.

    Args:
      folder: of the states; without it, the training would start anew.
      what: it holds.
    """

    def __init__(self, folder: Path, what: str):
        self.folder = folder
        super().__init__(
            f"{folder} holds {what}: add --overwrite to train anew, or choose another "
            "--workdir"
        )


def train(
    plan: Plan,
    state: State,
    step: Callable[[State, Batch], tuple[State, Any]],
    batches: Callable[[int], Generator[Batch, None, None]],
    evaluate: Callable[[State], Evaluation],
    *,
    progress: Progress,
    stopping: Stopping,
) -> Trained:
    """Trains until `plan.total` steps are done, from the newest snapshot on.

    A training that is told to stop finishes its step, saves and raises `Stopped`. If a
    batch cannot be read, the state before it is saved.

    Args:
      plan: how long, and where snapshots go.
      state: before the first step: a pytree of arrays, dicts and Flax structs, which
        may be donated to `step`.
      step: the state and a batch -> the state after it, and losses of any shape.
      batches: batch k, k + 1, ... from k on.
      evaluate: run after every `evaluate_every` steps, and after the last one.
      progress: shows steps and losses.
      stopping: hears that this start is to stop.

    Raises:
      Unusable: the folder holds a training with another key, or damaged snapshots
        only.
      OSError: a snapshot cannot be written.
      Stopped: told to stop; everything is saved.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with Snapshots(plan.folder, counted="steps") as snapshots:
        run = _Run(plan, snapshots, state)
        newest = _newest(plan, snapshots)
        if newest:
            run.resume(newest)
        if run.done < plan.total:
            stopping.finish_steps()
            progress.begin(plan.label, plan.total, run.done)
            try:
                _loop(run, step, batches, evaluate, progress, stopping)
            finally:
                progress.end()
            stopping.finish_steps(False)
    return Trained(run.state, run.history, run.arrays)


def _loop(
    run: "_Run",
    step: Callable[[Any, Any], tuple[Any, Any]],
    batches: Callable[[int], Generator[Any, None, None]],
    evaluate: Callable[[Any], Evaluation],
    progress: Progress,
    stopping: Stopping,
) -> None:
    plan, losses = run.plan, None
    with closing(batches(run.done)) as stream:
        while run.done < plan.total:
            try:
                batch = next(stream)
            except Exception:
                run.save()  # an unreadable image, say: what is done is not lost
                raise
            run.state, newer = step(run.state, batch)
            run.done += 1
            if losses is not None:  # waits for the step before, not for this one
                progress.at(run.done - 1, _shown(losses))
            losses = newer
            last, every = run.done == plan.total, plan.evaluate_every
            if last or (every and run.done % every == 0):
                _evaluate(run, evaluate, progress)
            elif run.done % plan.save_every == 0:
                run.save()
            if stopping.asked and not last:
                run.save()
                raise Stopped(stopping.asked)


def _evaluate(
    run: "_Run", evaluate: Callable[[Any], Evaluation], progress: Progress
) -> None:
    run.keep(evaluate(run.state))
    run.save()
    if summary := run.history[run.done]:
        told = ", ".join(
            f"{k} {np.nan if x is None else x:.4g}" for k, x in summary.items()
        )
        progress.say(f"{run.plan.label}, {run.done} steps: {told}")
    if run.done < run.plan.total:  # the evaluation may have shown its own progress
        progress.begin(run.plan.label, run.plan.total, run.done)


def _shown(losses: Any) -> str:
    """Such as "loss 1.230", or of several heads "loss 0.012 to 7.605"."""
    values = np.unique(np.asarray(losses))
    return "loss " + " to ".join(f"{x:.3f}" for x in values[[0, -1]][: len(values)])


class _Run:
    """Where a training is."""

    def __init__(self, plan: Plan, snapshots: Snapshots, state: Any):
        # As it comes back from JSON, so that keys can be compared.
        key = {**plan.key, "steps": plan.total, "evaluations": plan.evaluate_every}
        self.plan = plan._replace(key=json.loads(json.dumps(key)))
        self._snapshots = snapshots
        self.state, self.done = state, 0
        self.history: dict[int, Summary] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def keep(self, evaluation: Evaluation) -> None:
        self.history[self.done] = {
            name: float(x) if math.isfinite(x) else None
            for name, x in evaluation.summary.items()
        }
        self.arrays = dict(evaluation.arrays)

    def save(self) -> None:
        if not self.done:
            return
        tree = {"state": serialization.to_state_dict(self.state)}
        if self.arrays:
            tree["arrays"] = self.arrays
        history = {str(step): summary for step, summary in self.history.items()}
        metadata = {"key": self.plan.key, "history": history}
        self._snapshots.save(self.done, tree, metadata)

    def resume(self, newest: Newest) -> None:
        """Takes over a snapshot, on the devices of the state before the first step."""
        there, key = newest.metadata.get("key", {}), self.plan.key
        names = sorted({*there, *key})
        if other := [name for name in names if there.get(name) != key.get(name)]:
            what = f"a training with another {', '.join(other)}"
            raise Unusable(self.plan.folder, what)
        like = serialization.to_state_dict(self.state)
        placed = jax.tree.map(_placed_like, newest.tree["state"], like)
        self.state = serialization.from_state_dict(self.state, placed)
        self.done = newest.metadata["num_images"]
        self.history = {
            int(step): summary for step, summary in newest.metadata["history"].items()
        }
        self.arrays = newest.tree.get("arrays", {})


def _placed_like(array: np.ndarray, like: Any) -> jax.Array:
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(  # the key should have told
            f"a snapshot holds {array.dtype} {array.shape}, expected {like.dtype} "
            f"{like.shape}"
        )
    # In memory of its own: a step may reuse that of its state.
    return jax.device_put(np.array(array), like.sharding)


def _newest(plan: Plan, snapshots: Snapshots) -> Newest | None:
    try:
        newest = snapshots.load_newest()
    except DamagedError as cause:
        raise Unusable(plan.folder, f"nothing whole of {plan.label}") from cause
    for path, error in (newest.damaged if newest else {}).items():
        aside = snapshots.set_aside(path)
        cli.warn(f"{error}; it is set aside as {aside.name}")
    return newest
