"""The model itself, compiled: operation by operation a forward pass takes seconds."""

import functools

import jax

from sinder_jax import vit


@functools.partial(jax.jit, static_argnames=("config", "blocks"))
def tokens_after(config, params, images, blocks):
    """Raw tokens after each of these blocks, a tuple of arrays [B, T, D]."""
    apply = functools.partial(vit.ViT(config).apply, method="intermediates")
    return apply({"params": params}, images, blocks=blocks)
