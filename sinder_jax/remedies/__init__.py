"""Remedies for singular defects, beside the paper's repair, under one roof.

    model --REMEDIES[name].apply--> Remedied: params, and neurons to move at inference
    Remedied, images --register_neurons.forward--> features

The repairs themselves are in `repair` and `datafree`; here the models that they make
stand beside the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from sinder_jax import datafree
from sinder_jax.model import Model, check_same_architecture
from sinder_jax.remedies import ablation, clamping, register_neurons


class Remedied(NamedTuple):
    """A model after a remedy; its architecture is that of the model before.

    `register_neurons.forward` and `intermediates` run it.

    Attributes:
      params: the weights.
      neurons: whose activations move to an added token; of most remedies none.
    """

    params: Any
    neurons: register_neurons.Neurons = register_neurons.NONE


class Remedy(NamedTuple):
    """What can be done about a defect.

    Attributes:
      needs: what `apply` takes beside the model: "gamma", the largest singular value
        to leave; "photographs", normalized pixels of a few; "repaired", the `Model`
        that a repair made; empty if it takes None.
      apply: (model, what it needs) -> the model after the remedy.
    """

    needs: str
    apply: Callable[[Model, Any], Remedied]


def _nothing(model: Model, _: None) -> Remedied:
    return Remedied(model.params)


def _clamping(model: Model, gamma: float) -> Remedied:
    return Remedied(clamping.clamp_singular_values(model.config, model.params, gamma))


def _ablation(model: Model, _: None) -> Remedied:
    return Remedied(ablation.ablate(model.config, model.params))


def _test_time_registers(model: Model, photographs: Any) -> Remedied:
    neurons = register_neurons.find(model.config, model.params, photographs)
    return Remedied(model.params, neurons)


def _data_free(model: Model, _: None) -> Remedied:
    return Remedied(datafree.repair(model.config, model.params).params)


def _repaired(model: Model, repaired: Model) -> Remedied:
    check_same_architecture(model, repaired)
    return Remedied(repaired.params)


REMEDIES = {
    "nothing": Remedy("", _nothing),
    "clamping": Remedy("gamma", _clamping),
    "ablation": Remedy("", _ablation),
    "test-time registers": Remedy("photographs", _test_time_registers),
    "data-free": Remedy("", _data_free),
    "SINDER": Remedy("repaired", _repaired),
    "hybrid": Remedy("repaired", _repaired),  # data-free, then SINDER
}
"""Every remedy, by the name to print."""
