"""The forward pass beside PyTorch's, which uses its fused attention.

    python -m benchmarks.run features

Images and weights lie on the device. On a CPU: ViT-L, one image of 518 pixels. On a
GPU: S, L and g, 16 images, with float32 products ("highest") and with TF32 ("high").
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

import convert
from benchmarks import synthetic, torch_device
from benchmarks.timing import Numbers, in_turn, summary, tell
from convert import torch_vit
from sinder_jax import families, vit


class Case:
    """Random weights and images, for us and for PyTorch.

    Args:
      config: the architecture, with the images' size as its own.
      images: of a pass.
      device: of PyTorch.
    """

    def __init__(self, config: vit.ViTConfig, images: int, device: torch.device):
        self._config, self._images = config, images
        params = synthetic.random_params(config)
        self._state = {
            name: torch.from_numpy(x).to(device)
            for name, x in convert.to_torch(config, params).items()
        }
        self._params = jax.tree.map(jnp.asarray, params)
        size = config.img_size
        rng = np.random.default_rng(1)
        pixels = rng.standard_normal((images, size, size, 3), np.float32)
        self._pixels = jnp.asarray(pixels)
        channels_first = np.ascontiguousarray(np.moveaxis(pixels, 3, 1))
        self._torch_pixels = torch.from_numpy(channels_first).to(device)

    def theirs(self) -> torch.Tensor:
        """Tokens [B, T, D] of PyTorch."""
        with torch.no_grad():
            tokens = torch_vit.features(
                self._state,
                self._torch_pixels,
                num_heads=self._config.num_heads,
                norm_epsilon=families.of(self._config).norm_epsilon,
            )
        torch_device.wait()
        return tokens

    def times(self, precision: str, rounds: int) -> Numbers:
        """Times both with products of a precision, which PyTorch has been told."""
        model = vit.ViT(self._config, precision=precision)
        apply = jax.jit(lambda params, x: model.apply({"params": params}, x))
        start = time.perf_counter()
        compiled = apply.lower(self._params, self._pixels).compile()
        compile_seconds = time.perf_counter() - start

        def ours() -> vit.Features:
            return jax.block_until_ready(compiled(self._params, self._pixels))

        seconds = in_turn(rounds, PyTorch=self.theirs, ours=ours)
        numbers = summary(seconds, "PyTorch")
        each = {k: self._images / x for k, x in numbers["seconds"].items()}
        numbers["images/s"] = each
        numbers["compile seconds"] = compile_seconds
        numbers["largest relative difference"] = _difference(ours(), self.theirs())
        return numbers


def _difference(ours: vit.Features, theirs: torch.Tensor) -> float:
    """Of class and patch tokens, relative to the largest number."""
    expected = theirs.cpu().numpy()
    patches = np.asarray(ours.patches).reshape(len(expected), -1, expected.shape[-1])
    found = np.concatenate([np.asarray(ours.cls)[:, None], patches], axis=1)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def bench_features(rounds: int, quick: bool) -> Numbers:
    """Compares the forward pass with PyTorch's."""
    on_cpu = jax.default_backend() == "cpu"
    names = ["dinov2_vitl14"] if on_cpu else [f"dinov2_vit{x}14" for x in "slg"]
    if quick:
        names = ["dinov2_vits14"]
    numbers: Numbers = {}
    for name in names:
        config = dataclasses.replace(vit.CONFIGS[name], img_size=112 if quick else 518)
        case = Case(config, 1 if on_cpu else 16, torch_device.prepare("highest"))
        for precision in ("highest",) if on_cpu else ("highest", "high"):
            torch_device.prepare(precision)
            numbers[f"{name}, {precision}"] = case.times(precision, rounds)
            tell(f"{name}, {precision}", numbers[f"{name}, {precision}"])
    return numbers
