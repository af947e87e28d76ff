"""STEGO's step in plain PyTorch: what ours is compared with, in tests and for speed.

Channels come first, as there; what is random is given, so both draw the same.
"""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sinder_jax.evals import stego


class Baseline:
    """Head and probes with three Adams.

    Args:
      params: to start from.
      options: of the training.
      device: of the parameters.
    """

    def __init__(
        self,
        params: stego.Params,
        options: stego.StegoOptions,
        device: torch.device | None = None,
    ):
        self._options = options
        self.head, self.linear = (
            [_parameter(x, device) for layer in part for x in layer]
            for part in (params.head, [params.linear])
        )
        self.centroids = _parameter(params.centroids, device)
        self._optimizers = [
            torch.optim.Adam(some, rate)
            for some, rate in (
                (self.head, options.lr),
                (self.linear, options.probe_lr),
                ([self.centroids], options.probe_lr),
            )
        ]

    def params(self) -> stego.Params:
        """The parameters as they are now."""
        arrays = [x.detach().cpu().numpy() for x in (*self.head, *self.linear)]
        layers = [stego.Linear(*arrays[i : i + 2]) for i in range(0, len(arrays), 2)]
        centroids = self.centroids.detach().cpu().numpy()
        return stego.Params(stego.Head(*layers[:3]), layers[3], centroids)

    def step(
        self,
        kept: torch.Tensor,
        coordinates: torch.Tensor,
        negatives: torch.Tensor,
        features: torch.Tensor,
        labels: torch.Tensor,
    ) -> list[torch.Tensor]:
        """One step.

        Args:
          kept: channels, [2, 3, B, D].
          coordinates: [2, B, S, S, 2].
          negatives: [negatives, B].
          features: of images and positives, [2, B, D, h, w].
          labels: [B, height, width].

        Returns:
          The terms in the order of `stego.Losses`.
        """
        options = self._options
        masks = kept[..., None, None] / (1 - options.dropout)
        code, code_pos = (
            self._code(x * mask[0], x * mask[1])
            for x, mask in zip(features, masks, strict=True)
        )
        maps, maps_pos = features * masks[:, 2]
        here, there = coordinates
        feats, codes = _sample(maps, here), _sample(code, here)
        feats_pos, codes_pos = _sample(maps_pos, there), _sample(code_pos, there)
        negative, inter, intra = options.row.shifts
        terms = [
            torch.cat(
                [
                    _helper(
                        feats,
                        _sample(maps[order], there),
                        codes,
                        _sample(code[order], there),
                        negative,
                    )
                    for order in negatives
                ]
            ).mean(),
            _helper(feats, feats_pos, codes, codes_pos, inter).mean(),
            _helper(feats, feats, codes, codes, intra).mean(),
        ]
        detached = code.detach().clone()
        linear, cluster = self._probes(detached, labels)
        weights = options.row.weights
        total = sum(w * x for w, x in zip(weights, terms, strict=True))
        total = total + linear + cluster
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        total.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return [x.detach() for x in (*terms, linear, cluster, total)]

    def _code(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        linear, hidden, output = (self.head[i : i + 2] for i in (0, 2, 4))
        inner = torch.relu(_convolve(hidden, second))
        return _convolve(linear, first) + _convolve(output, inner)

    def _probes(self, code: torch.Tensor, labels: torch.Tensor) -> Any:
        classes = len(self.centroids)
        logits = functional.interpolate(
            _convolve(self.linear, code),
            labels.shape[1:],
            mode="bilinear",
            align_corners=False,
        )
        logits = logits.permute(0, 2, 3, 1).reshape(-1, classes)
        flat = labels.reshape(-1)
        known = (flat >= 0) & (flat < classes)
        linear = functional.cross_entropy(logits[known], flat[known])
        products = torch.einsum(
            "bchw,nc->bnhw",
            functional.normalize(code, dim=1),
            functional.normalize(self.centroids, dim=1),
        )
        choice = functional.one_hot(products.argmax(dim=1), classes)
        cluster = -(choice.permute(0, 3, 1, 2) * products).sum(1).mean()
        return linear, cluster


def _parameter(x: Any, device: torch.device | None) -> torch.Tensor:
    return torch.tensor(np.array(x), device=device).requires_grad_()


def _convolve(layer: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    weight, bias = layer
    return functional.conv2d(x, weight.T[..., None, None], bias)


def _sample(maps: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    return functional.grid_sample(
        maps, coordinates, padding_mode="border", align_corners=True
    )


def _helper(
    f1: torch.Tensor, f2: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, shift: float
) -> torch.Tensor:
    with torch.no_grad():
        fd = _correlation(f1, f2)
        mean = fd.mean()
        fd = fd - fd.mean([3, 4], keepdim=True)
        fd = fd - fd.mean() + mean
    return -_correlation(c1, c2).clamp(0) * (fd - shift)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = (functional.normalize(x, dim=1, eps=1e-10) for x in (a, b))
    return torch.einsum("nchw,ncij->nhwij", a, b)
