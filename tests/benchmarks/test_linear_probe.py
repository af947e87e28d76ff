import numpy as np
import pytest

from sinder_jax import vit


@pytest.mark.slow
def test_losses_are_those_of_the_pytorch_loop():
    pytest.importorskip("torch")
    from benchmarks import linear_probe

    config = vit.ViTConfig(64, 4, 1, "mlp", img_size=28)
    case = linear_probe.Case(config, 2)
    for _ in range(3):
        ours, theirs = case.ours(), case.all_heads()
        assert ours.shape == (52,)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert case.one_head().shape == (1,)
