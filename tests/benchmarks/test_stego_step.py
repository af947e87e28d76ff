import numpy as np
import pytest


@pytest.mark.slow
def test_losses_are_those_of_pytorch_step_by_step():
    pytest.importorskip("torch")
    from benchmarks import stego_step, torch_device

    case = stego_step.Case(2, 4, 32, 5, torch_device.prepare("highest"))
    np.testing.assert_allclose(case.ours(), case.theirs(), atol=1e-5)
    # Later steps draw anew, PyTorch's does not: another batch of random numbers.
    assert np.abs(case.ours() - case.theirs()).max() > 1e-4
    assert case.bytes() > 0
