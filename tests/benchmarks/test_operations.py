import pytest

from benchmarks import operations
from sinder_jax import vit

GIANT = vit.CONFIGS["dinov2_vitg14"]
TOKENS = 1370


def test_the_authors_step_is_what_pytorch_counts():
    pytest.importorskip("torch")
    from benchmarks import torch_baseline

    counted = torch_baseline.count_operations()
    ours = operations.authors_step(GIANT, TOKENS, 0)
    # ours leaves out the cosines and the loss: a few million operations
    assert ours == pytest.approx(sum(counted.values()), rel=1e-4)


def test_our_step_at_the_giants_last_block():
    """The terms as added up by hand."""
    step = operations.our_step(GIANT, TOKENS, 39)
    assert step.search == pytest.approx(40 * 89.1, rel=1e-3)
    assert step.merge == pytest.approx(725, rel=1e-3)
    assert step.eps == pytest.approx(10 * 52, rel=1e-2)
    assert step.total == pytest.approx(5_870, rel=1e-3)


def test_blocks_behind_the_defect_cost_nothing_and_the_window_is_bounded():
    first, last = (operations.our_step(GIANT, TOKENS, block) for block in (0, 39))
    assert first.search == pytest.approx(last.search / 40)
    assert first.merge == pytest.approx(last.merge / 10)
    assert operations.our_step(GIANT, TOKENS, 9)[1:] == last[1:]
