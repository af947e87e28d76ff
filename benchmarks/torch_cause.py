"""CAUSE-TR's second stage in PyTorch, to be timed and compared with.

Structured as ByungKwanLee/Causal-Unsupervised-Segmentation: PyTorch's attention, one
image after the other in the contrastive loss, cosines of code vectors at each step. In
float32, and with the bank as one tensor, where the original joins its queues anew.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from benchmarks import torch_device


class Head(nn.Module):
    """The decoder block and both projections.

    Args:
      params: of `cause_head`.
      dropout: probability.
    """

    def __init__(self, params: Any, dropout: float):
        super().__init__()
        dim = params.queries.shape[1]
        self.queries = nn.Parameter(_tensor(params.queries))
        self.asking, self.crossing = (
            _attention(each, dim, dropout)
            for each in (params.self_attention, params.cross_attention)
        )
        self.wide, self.narrow, self.linear, self.hidden, self.nonlinear = (
            linear(getattr(params, name))
            for name in ("wide", "narrow", "linear", "hidden", "nonlinear")
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in params.norms)
        for module, norm in zip(self.norms, params.norms, strict=True):
            _set(module, norm.scale, norm.shift)
        self.drop = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        first, second, third = self.norms
        drop, e = self.drop, self.queries[None]
        q = quantized + e
        x = first(quantized + drop(_attend(self.asking, q, q, quantized)))
        x = second(x + drop(_attend(self.crossing, x + e, features, features)))
        x = third(x + drop(self.narrow(drop(self.wide(x).relu()))))
        h = features + x
        return self.linear(drop(h)) + self.nonlinear(self.hidden(drop(h)).relu())


def _attend(module: Any, q: Any, k: Any, v: Any) -> torch.Tensor:
    return module(q, k, v, need_weights=False)[0]


def _attention(params: Any, dim: int, dropout: float) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(dim, 1, dropout, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(_tensor(params.qkv.kernel).T)
        module.in_proj_bias.copy_(_tensor(params.qkv.bias))
    _set(module.out_proj, np.asarray(params.out.kernel).T, params.out.bias)
    return module


def linear(params: Any) -> nn.Linear:
    """A linear layer with the given weights."""
    module = nn.Linear(*params.kernel.shape)
    return _set(module, np.asarray(params.kernel).T, params.bias)


def _set(module: Any, weight: Any, bias: Any) -> Any:
    with torch.no_grad():
        module.weight.copy_(_tensor(weight))
        module.bias.copy_(_tensor(bias))
    return module


def _tensor(x: Any) -> torch.Tensor:
    return torch.tensor(np.array(x))


class Bank(NamedTuple):
    """Projections of earlier steps, and the unit code vector of each."""

    keys: torch.Tensor
    vectors: torch.Tensor


def contrastive_loss(
    student: torch.Tensor, teacher: torch.Tensor, vectors: torch.Tensor, bank: Bank
) -> torch.Tensor:
    """Local and global terms of all images.

    Args:
      student: sampled projections [B, n, P].
      teacher: likewise.
      vectors: unit code vectors of the tokens [B, n, D].
      bank: of earlier steps.
    """
    images, n, _ = student.shape
    local = normalize(teacher.flatten(0, 1), dim=-1), vectors.flatten(0, 1)
    everywhere = normalize(bank.keys, dim=-1), bank.vectors
    terms = []
    for keys, of_keys in (local, everywhere):
        for b in range(images):
            same = vectors[b] @ of_keys.T
            positive, negative = same > 0.3, same < 0.1
            if keys is local[0]:
                own = torch.arange(n, device=student.device)
                positive[own, own + b * n] = False
            scores = normalize(student[b], dim=-1) @ keys.T / 0.07
            out = ~(positive | negative)
            sums = scores.masked_fill(out, -torch.inf).logsumexp(1, keepdim=True)
            terms.append((sums - scores)[positive].mean())
    return torch.stack(terms).mean()


class Trainer:
    """Student, teacher and probe with their optimizer.

    Args:
      state: of `front_door`, whose weights and bank are taken over.
      codebook: [K, D].
      lr: learning rate.
      dropout: probability.
      device: of all of it.
    """

    def __init__(
        self,
        state: Any,
        codebook: Any,
        lr: float,
        dropout: float,
        device: torch.device | None = None,
    ):
        self._codebook = _tensor(codebook).to(device)
        self._unit = normalize(self._codebook, dim=-1)
        self.student, self.teacher = (
            nn.ModuleList([Head(branch.head, dropout), linear(branch.projection)]).to(
                device
            )
            for branch in (state.student, state.teacher)
        )
        self._linear = linear(state.linear).to(device)
        self._parameters = [*self.student.parameters(), *self._linear.parameters()]
        self._optimizer = torch.optim.Adam(self._parameters, lr)
        counts = np.asarray(state.bank.counts)
        filled = np.arange(state.bank.keys.shape[1])[None] < counts[:, None]
        codes = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        keys = _tensor(np.asarray(state.bank.keys)[filled]).to(device)
        self._bank = Bank(keys, self._unit[codes.to(device)])

    def step(
        self, features: Any, labels: Any, cells: Any, clip: float = 1.0
    ) -> tuple[float, float]:
        """One step; returns the contrastive loss and the probe's.

        Args:
          features: tokens [B, N, D].
          labels: int64 [B, size, size].
          cells: the sampled tokens of each image [B, n].
          clip: norm of the gradients.
        """
        rows = torch.arange(len(features), device=features.device)[:, None]
        codes = (normalize(features, dim=-1) @ self._unit.T).argmax(-1)
        quantized = self._codebook[codes]
        with torch.no_grad():
            z = self.teacher[0](features, quantized)
            p_teacher = self.teacher[1](z[rows, cells])
        z_student = self.student[0](features, quantized)
        contrast = contrastive_loss(
            self.student[1](z_student[rows, cells]),
            p_teacher,
            self._unit[codes[rows, cells]],
            self._bank,
        )
        side = round(features.shape[1] ** 0.5)
        logits = self._linear(z).transpose(1, 2).unflatten(2, (side, side))
        dense = interpolate(logits, labels.shape[1:], mode="bilinear")
        probed = cross_entropy(dense, labels, ignore_index=255)
        self._optimizer.zero_grad()
        (contrast + probed).backward()
        nn.utils.clip_grad_norm_(self._parameters, clip)
        self._optimizer.step()
        with torch.no_grad():
            for old, new in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                old.lerp_(new, 0.01)
        torch_device.wait()
        return contrast.item(), probed.item()
