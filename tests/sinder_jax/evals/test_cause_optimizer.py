import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samples import error_of
from sinder_jax.evals.cause_optimizer import Options, moments_of, update

OPTIONS = Options(lr=0.05, weight_decay=0.3, clip=0.5, halve_every=4)
STEPS = 10


def gradients():
    rng = np.random.default_rng(0)
    scales = np.geomspace(0.01, 10, STEPS)[:, None]
    return scales * rng.normal(size=(STEPS, 5))


def ours(options):
    params = {"a": jnp.arange(3.0), "b": jnp.ones(2)}
    moments = moments_of(params)
    for g in np.float32(gradients()):
        given = {"a": jnp.asarray(g[:3]), "b": jnp.asarray(g[3:])}
        params, moments = jax.jit(update, static_argnums=3)(
            params, given, moments, options
        )
    return np.concatenate([params["a"], params["b"]])


def theirs(options, kind="Adam", clip_last=False):
    torch = pytest.importorskip("torch")
    x = torch.tensor([0.0, 1, 2, 1, 1], dtype=torch.float64, requires_grad=True)
    optimizer = getattr(torch.optim, kind)(
        [x], options.lr, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.StepLR(
        optimizer, options.halve_every or 100, 0.5
    )
    for g in gradients():
        x.grad = torch.tensor(g)
        if clip_last:
            x.grad += options.weight_decay * x.detach()
            optimizer.param_groups[0]["weight_decay"] = 0
        if options.clip:
            torch.nn.utils.clip_grad_norm_([x], options.clip)
        optimizer.step()
        schedule.step()
    return x.detach().numpy()


@pytest.mark.parametrize("options", [OPTIONS, Options(lr=0.05)])
def test_steps_are_those_of_pytorch(options):
    np.testing.assert_allclose(ours(options), theirs(options), atol=1e-5)


def test_each_convention_matters():
    found = ours(OPTIONS)
    others = {
        "decoupled decay": theirs(OPTIONS, "AdamW"),
        "clipped with the decay": theirs(OPTIONS, clip_last=True),
        "not clipped": theirs(Options(0.05, 0.3, 0.0, 4)),
        "not halved": theirs(Options(0.05, 0.3, 0.5, 0)),
        "halved later": theirs(Options(0.05, 0.3, 0.5, 5)),
    }
    for name, other in others.items():
        assert np.abs(found - other).max() > 1e-3, name


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": np.inf}, {"weight_decay": -1.0}, {"clip": -1.0}]
    + [{"halve_every": -1}],
)
def test_options_out_of_range_are_refused(wrong):
    assert f"got {next(iter(wrong))}=" in error_of(Options, **wrong)
