"""The jobs one runs from the command line: repair a model, watch, look, analyze."""

from sinder_jax import launch

launch.guard(__name__)
