"""Runs the converter's commands on small models: shared by the tests."""

import functools

import numpy as np

import convert
from convert.__main__ import main
from convert.files import hugging_face, writing
from convert.files.tensors import Spec
from samples import SMALL, random_params
from sinder_jax import checkpoint, factor

KINDS = {"swiglu": SMALL["swiglu"], "registers": SMALL["registers"]}
CONTAINERS = ["checkpoint", "dinov2", "hf", "timm"]


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def stored(folder, container, config, params):
    """A model in a container: a checkpoint or a layout's file or directory."""
    if container == "checkpoint":
        checkpoint.save(folder / "model", config, params)
        return folder / "model"
    state = convert.to_torch(config, params, container)
    if container == "hf":
        specs = {key: Spec(x.shape, "float32") for key, x in state.items()}
        contents = hugging_face.contents(config)
        writing.write_directory(folder / "hf", contents, specs, state.items())
        return folder / "hf"
    writing.write_state_dict(folder / f"{container}.safetensors", state)
    return folder / f"{container}.safetensors"


def loaded(path):
    model = convert.open_model(path)
    return dict(model.leaves())


@functools.cache
def repair(kind):
    """Params, their factors, ε of the last block, repaired params."""
    config = KINDS[kind]
    params = random_params(config)
    factors = factor.factorize(config, params)
    rng = np.random.default_rng(1)
    eps = {}
    for name, sigma in factors.sigma.items():
        eps[name] = np.zeros_like(sigma)
        size = sigma[-1].shape
        eps[name][-1] = 0.05 * sigma[-1] * rng.uniform(-1, 1, size)
    return params, factors, eps, factor.merge(params, factors, eps)
