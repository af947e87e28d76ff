"""The linear probe's step: all 52 heads, beside two PyTorch loops.

    python -m benchmarks.run linear

A step takes the features of a batch from the backbone and moves every head once. The
loops in PyTorch, with transformers' DINOv2 and the same weights and images:

    one pass for all heads     52 nn.Linear on one pass, losses added up, one SGD, as
                               dinov2/eval/linear.py does
    one pass for each head     a plain loop trains one head; 52 follow one another
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import torch

import convert
from benchmarks import synthetic, torch_device
from benchmarks.timing import in_turn
from sinder_jax import families, vit
from sinder_jax.evals import features, linear

CLASSES = 1000
BLOCKS = 4
EACH, ALL, OURS = "PyTorch, one pass for each head", "PyTorch, one pass for all", "ours"


class Case:
    """One batch, the backbone and the heads, for us and for PyTorch.

    Args:
      config: the architecture, with the images' size as its own.
      images: of a batch.
      device: of PyTorch.
    """

    def __init__(
        self,
        config: vit.ViTConfig,
        images: int,
        device: torch.device | None = None,
    ):
        size = config.img_size
        rng = np.random.default_rng(0)
        self.pixels = rng.standard_normal((images, size, size, 3), np.float32)
        self.labels = rng.integers(0, CLASSES, images).astype(np.int32)
        self.rates = linear.scaled(linear.BASE_LEARNING_RATES, images)
        params = synthetic.random_params(config)
        self._extract = features.make_extract(
            config,
            params,
            blocks=features.last_blocks(config, BLOCKS),
            of=lambda found: linear.features(*found),
            batch_axis=0,
            group=images,
        )
        self._step = linear.make_step(10_000, donate=True)
        self.heads = {
            kind: linear.init(
                jax.random.key(number),
                config.embed_dim * (kind[0] + kind[1]),
                CLASSES,
                self.rates,
            )
            for number, kind in enumerate(linear.KINDS)
        }
        self._backbone = backbone(config, params).to(device)
        self._torch_heads = {
            kind: [_head(heads, k).to(device) for k in range(len(self.rates))]
            for kind, heads in self.heads.items()
        }
        self._optimizer = torch.optim.SGD(
            [
                {"params": head.parameters(), "lr": rate}
                for heads in self._torch_heads.values()
                for head, rate in zip(heads, self.rates, strict=True)
            ],
            momentum=0.9,
        )
        x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(self.pixels, 3, 1)))
        self._torch_batch = (
            x.to(device),
            torch.from_numpy(self.labels).long().to(device),
        )

    def ours(self) -> np.ndarray:
        """One step of all heads; returns their losses, [52]."""
        losses = []
        for kind, x in self._extract(self.pixels).items():
            self.heads[kind], loss = self._step(self.heads[kind], x, self.labels)
            losses.append(loss)
        jax.block_until_ready(self.heads)
        return np.concatenate(losses)

    def all_heads(self) -> np.ndarray:
        """One step of all heads on one pass in PyTorch; returns their losses."""
        return self._torch_step(self._torch_heads)

    def one_head(self) -> np.ndarray:
        """One step of one head, of the widest features, in PyTorch."""
        return self._torch_step({(4, True): self._torch_heads[4, True][-1:]})

    def _torch_step(self, chosen: dict[Any, list[torch.nn.Linear]]) -> np.ndarray:
        pixels, labels = self._torch_batch
        found = self._torch_features(pixels)
        losses = [
            torch.nn.functional.cross_entropy(head(found[kind]), labels)
            for kind, heads in chosen.items()
            for head in heads
        ]
        self._optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        self._optimizer.step()
        torch_device.wait()
        return np.array([loss.item() for loss in losses])

    def _torch_features(self, pixels: torch.Tensor) -> dict[Any, torch.Tensor]:
        with torch.no_grad():
            hidden = self._backbone(pixels, output_hidden_states=True).hidden_states
            last = [self._backbone.layernorm(x) for x in hidden[-BLOCKS:]]
        cls, mean = [x[:, 0] for x in last], last[-1][:, 1:].mean(dim=1)
        return {
            (count, pooled): torch.cat([*cls[-count:], *([mean] * pooled)], dim=1)
            for count, pooled in linear.KINDS
        }


def backbone(config: vit.ViTConfig, params: Any) -> Any:
    """Transformers' DINOv2 with our weights, on the host."""
    import transformers

    state = convert.to_torch(config, params, layout="hf")
    made = transformers.Dinov2Model.from_pretrained(
        None,
        config=transformers.Dinov2Config(
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            image_size=config.img_size,
            patch_size=config.patch_size,
            layer_norm_eps=families.of(config).norm_epsilon,
        ),
        state_dict={key: torch.from_numpy(x) for key, x in state.items()},
    )
    return made.eval()


def _head(heads: linear.Heads, number: int) -> torch.nn.Linear:
    kernel, bias = np.array(heads.kernel[number].T), np.array(heads.bias[number])
    head = torch.nn.Linear(*kernel.shape[::-1])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(kernel))
        head.bias.copy_(torch.from_numpy(bias))
    return head


def bench_linear(rounds: int, quick: bool) -> dict[str, Any]:
    """Steps per second of all 52 heads of S, features included.

    On a CPU 32 images of 224 pixels, on a GPU 256.
    """
    on_cpu = jax.default_backend() == "cpu"
    device = torch_device.prepare("highest")
    config = dataclasses.replace(
        vit.CONFIGS["dinov2_vits14"], img_size=56 if quick else 224
    )
    images = 4 if quick else 32 if on_cpu else 256
    case = Case(config, images, device)
    difference = float(np.abs(case.ours() - case.all_heads()).max())
    seconds = in_turn(
        rounds, **{EACH: case.one_head, ALL: case.all_heads, OURS: case.ours}
    )
    heads = len(linear.KINDS) * len(case.rates)
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    medians[EACH] *= heads  # one after the other
    return {
        "images per step": images,
        "steps/s of all heads": {name: 1 / x for name, x in medians.items()},
        "ours is times faster than": {
            x: medians[x] / medians[OURS] for x in (EACH, ALL)
        },
        "largest difference of a loss": difference,
        "all seconds": seconds,
    }
