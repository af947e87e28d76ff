"""PyTorch transcriptions of the heads of DINOv2's evaluations, to compare with."""

import math

import numpy as np
import torch
from torch import nn

from sinder_jax.evals import depth
from sinder_jax.evals.segmentation import windows


class DepthHead(nn.Module):
    """The original's order: upsample, concatenate, convolve, weigh the bins."""

    def __init__(self, channels, options):
        super().__init__()
        self.conv = nn.Conv2d(channels, depth.BINS, 1)
        bins = torch.linspace(options.min_depth, options.max_depth, depth.BINS)
        self.bins = bins[None, :, None, None]

    def forward(self, features, size):
        blocks = [
            nn.functional.interpolate(x, scale_factor=4, mode="bilinear")
            for x in features.chunk(2, dim=1)
        ]
        weights = torch.relu(self.conv(torch.cat(blocks, dim=1))) + 0.1
        weights = weights / weights.sum(dim=1, keepdim=True)
        found = (weights * self.bins).sum(dim=1, keepdim=True)
        return nn.functional.interpolate(found, size, mode="bilinear")[:, 0]


def depth_loss(predicted, truth, warm_up):
    valid = truth > 0
    g = torch.log(predicted[valid] + 0.001) - torch.log(truth[valid] + 0.001)
    if warm_up:
        return torch.sqrt(0.15 * g.mean() ** 2)
    return torch.sqrt(g.var() + 0.15 * g.mean() ** 2)


def train_depth(head, features, truth, options):
    """AdamW with both schedules; the loss in groups of two images, averaged."""
    parameters = list(head.parameters())
    optimizer = torch.optim.AdamW(
        parameters, 1.0, weight_decay=options.weight_decay, eps=1e-8
    )
    total, losses = options.total_steps, []
    turn, warm = int(0.3 * total) - 1, total // 3
    for i, (x, y) in enumerate(zip(features, truth, strict=True)):
        cosine = 1e-8 + 0.5 * (1 - 1e-8) * (1 + math.cos(math.pi * i / total))
        rate = options.learning_rate * cosine
        rate *= 1 - (1 - min(i / warm, 1)) * (1 - 0.001)
        share = i / turn if i <= turn else 1 - (i - turn) / (total - 1 - turn)
        beta = 0.85 + 0.05 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0].update(lr=rate, betas=(beta, 0.999))
        predicted = head(x, y.shape[1:])
        groups = zip(predicted.split(2), y.split(2), strict=True)
        loss = torch.stack(
            [depth_loss(*group, i < options.loss_warm_up) for group in groups]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, options.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


class SegmentationHead(nn.Module):
    def __init__(self, state):
        super().__init__()
        channels, classes = state.head.kernel.shape
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1)
        with torch.no_grad():
            kernel = np.array(state.head.kernel).T[..., None, None]
            self.conv.weight.copy_(torch.tensor(kernel))
            for ours, theirs in (
                (state.head.bias, self.conv.bias),
                (state.head.scale, self.bn.weight),
                (state.head.shift, self.bn.bias),
                (state.mean, self.bn.running_mean),
                (state.variance, self.bn.running_var),
            ):
                theirs.copy_(torch.tensor(np.array(ours)))

    def forward(self, features, size):
        x = self.conv(self.bn(torch.tensor(features).permute(0, 3, 1, 2)))
        return nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)


def sliding(head, image, features_of, crop, stride, size):
    """mmsegmentation's way: whole arrays of window logits, summed and divided."""
    height, width, _ = image.shape
    total, count = 0, torch.zeros(height, width)
    for y in windows(height, crop, stride):
        for x in windows(width, crop, stride):
            features = features_of(image[y[0] : y[1], x[0] : x[1]])
            scores = head(features[None], (y[1] - y[0], x[1] - x[0]))[0]
            placed = torch.zeros(len(scores), height, width)
            placed[:, y[0] : y[1], x[0] : x[1]] = scores
            total = total + placed
            count[y[0] : y[1], x[0] : x[1]] += 1
    merged = nn.functional.interpolate((total / count)[None], size, mode="bilinear")
    return merged[0].softmax(0).permute(1, 2, 0).detach().numpy()
