"""A head's training: the same bits whenever it was killed."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.evaluation import training
from experiments.evaluation.progress import Progress
from experiments.run.stopping import Stopping
from samples import error_of
from sinder_jax.evals import linear


def batches(start, *, failing_at=None):
    for k in range(start, 10**6):
        if k == failing_at:
            raise ValueError("a.jpg: truncated")
        rng = np.random.default_rng(k)
        yield rng.standard_normal((8, 3), np.float32), rng.integers(0, 4, 8)


def evaluate(state):
    loss = float(jnp.sum(state.kernel))
    arrays = {"kernel": np.asarray(state.kernel)}
    return training.Evaluation({"sum": loss, "nothing": float("nan")}, arrays)


class Stepped(Exception):
    """The machine that runs the training has died."""


def train(folder, *, die_after=None, stop_after=None, failing_at=None, **changes):
    """Trains two heads for ten steps; returns Trained and the steps taken now."""
    plan = training.Plan(folder, {"data": "x"}, 10, 3, 4, "heads")
    plan = plan._replace(**changes)
    step, taken = linear.make_step(plan.total), []

    def counted(state, batch):
        if die_after == len(taken):
            raise Stepped
        taken.append(int(state.step))
        if stop_after == len(taken):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *batch)

    state = linear.init(jax.random.key(0), 3, 4, [0.1, 0.5])
    state = jax.device_put(state, jax.devices()[1])
    with Progress() as progress, Stopping() as stopping:
        trained = training.train(
            plan,
            state,
            counted,
            lambda start: batches(start, failing_at=failing_at),
            evaluate,
            progress=progress,
            stopping=stopping,
        )
        return trained, taken
    return None, taken  # stopped


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trained, taken = train(tmp_path_factory.mktemp("whole"))
    assert taken == list(range(10))
    return trained


def test_evaluations_are_kept(whole):
    assert list(whole.history) == [4, 8, 10]
    assert whole.history[10] == {
        "sum": float(np.sum(whole.state.kernel)),
        "nothing": None,
    }
    assert_same(whole.arrays["kernel"], whole.state.kernel)


@pytest.mark.parametrize(("died", "resumed"), [(2, 0), (5, 4), (7, 6), (9, 9)])
def test_a_killed_training_resumes_to_the_same_bits(whole, tmp_path, died, resumed):
    with pytest.raises(Stepped):
        train(tmp_path, die_after=died)
    trained, taken = train(tmp_path)
    assert taken == list(range(resumed, 10))
    assert_same(trained, whole)
    assert trained.state.kernel.devices() == {jax.devices()[1]}


def test_a_finished_training_is_not_repeated(whole, tmp_path):
    train(tmp_path)
    trained, taken = train(tmp_path)
    assert taken == [] and trained.history == whole.history
    assert_same(trained, whole)


def test_a_signal_lets_the_step_finish_and_saves(whole, tmp_path, capsys):
    stopped, taken = train(tmp_path, stop_after=2)
    assert stopped is None and taken == [0, 1]
    assert "stopped by SIGTERM" in capsys.readouterr().err
    trained, taken = train(tmp_path)
    assert taken == list(range(2, 10))
    assert_same(trained, whole)


def test_an_unreadable_batch_loses_nothing(whole, tmp_path):
    assert error_of(train, tmp_path, failing_at=5) == "a.jpg: truncated"
    trained, taken = train(tmp_path)
    assert taken == list(range(5, 10))
    assert_same(trained, whole)


def test_a_training_of_something_else_is_refused(tmp_path):
    train(tmp_path)
    message = error_of(train, tmp_path, key={"data": "y", "lr": 1})
    assert "another data, lr: add --overwrite to train anew" in message
    assert "another steps" in error_of(train, tmp_path, total=12)


def test_a_flipped_bit_is_noticed(whole, tmp_path, capsys):
    with pytest.raises(Stepped):
        train(tmp_path, die_after=9)
    newest = sorted(tmp_path.glob("0*"))[-1]
    stored = max(
        newest.rglob("*"), key=lambda path: path.is_file() * path.stat().st_size
    )
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    trained, taken = train(tmp_path)
    assert taken[0] < 9 and "damaged" in capsys.readouterr().err
    assert_same(trained, whole)


def test_a_training_of_which_nothing_is_whole_is_refused(tmp_path):
    train(tmp_path)
    for stored in tmp_path.rglob("*"):
        if stored.is_file():
            stored.write_bytes(b"x")
    message = error_of(train, tmp_path)
    assert "holds nothing whole of heads: add --overwrite to train anew" in message
