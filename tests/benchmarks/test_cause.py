import numpy as np
import pytest

from sinder_jax.evals import cause_head


@pytest.mark.slow
def test_losses_are_those_of_the_pytorch_transcription(monkeypatch):
    """And so are the weights after a step, but for Adam's start where a slope is 0."""
    pytest.importorskip("torch")
    from benchmarks import cause

    monkeypatch.setattr(cause_head, "DROPOUT", 0.0)
    case = cause.Case(
        images=3,
        side=9,
        dim=24,
        size=60,
        codes=12,
        bank_size=6,
        filled=40,
        projected=20,
        classes=4,
    )
    ours, theirs = case.ours(), case.theirs()
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    state, trainer = case.state, case.trainer
    for branch, modules in (
        (state.student, trainer.student),
        (state.teacher, trainer.teacher),
    ):
        pairs = (
            (branch.projection.kernel, modules[1].weight.T),
            (branch.head.linear.kernel, modules[0].linear.weight.T),
            (branch.head.queries, modules[0].queries),
            (branch.head.narrow.kernel, modules[0].narrow.weight.T),
            (
                branch.head.cross_attention.qkv.kernel,
                modules[0].crossing.in_proj_weight.T,
            ),
        )
        for found, want in pairs:
            gaps = np.abs(found - want.detach().numpy())
            assert np.median(gaps) < 1e-6 and np.mean(gaps > 1e-4) < 0.01
    assert state.bank.counts.sum() > 40
