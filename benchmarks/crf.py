"""The exact CRF, beside a plain one in PyTorch that computes all pairs of pixels.

    python -m benchmarks.run crf

Photographs are scikit-image's samples, resized as STEGO resizes; label maps are random
patches of 14 pixels, as sharp as a softmax at STEGO's temperature makes them. Time
depends on the colors of the image, which decide how many pairs of blocks are left.
"""

import time

import jax
import numpy as np
import torch

from benchmarks import torch_baseline
from benchmarks.timing import Numbers, in_turn, summary
from sinder_jax.data import crops, decode, listing
from sinder_jax.evals import crf

CLASSES = 27  # of Cityscapes
COMPARED = 84  # pixels: all pairs in PyTorch take seconds
SIDES = (160, 320, 560)  # of one image, ours only
TEMPERATURE = 2.0
ROWS = 128  # pixels whose pairs with all pixels PyTorch computes at a time
LEAST_EXPONENT = -80.0  # exp(-80) is 0 beside a row's sum, which is at least 1


def bench_crf(rounds: int, quick: bool) -> Numbers:
    """Ten iterations with 27 classes: the ratio, the pairs left, one image by size."""
    torch_baseline.set_device(jax.default_backend() == "cpu")
    torch_baseline.set_precision("highest")
    photographs = {
        path.stem: np.asarray(decode.read_rgb(path)) for path in listing.sample_images()
    }
    chosen = photographs["astronaut"]
    image, maps = _example(chosen, 28 if quick else COMPARED)
    found = {}

    def ours() -> None:
        found["ours"] = np.asarray(crf.mean_field(maps, image))

    def theirs() -> None:
        found["PyTorch"] = dense(maps, image)

    numbers = summary(in_turn(rounds, PyTorch=theirs, ours=ours), "PyTorch")
    difference = np.abs(found["ours"] - found["PyTorch"]).max()
    numbers["largest difference of a marginal"] = float(difference)
    side = 28 if quick else 320
    numbers[f"pairs left at {side} pixels"] = {
        name: crf.pairs_left(crops.square(pixels, side))
        for name, pixels in photographs.items()
    }
    numbers["seconds of one image, once"] = {
        f"{side} pixels": _seconds(*_example(chosen, side))
        for side in (SIDES[:0] if quick else SIDES)
    }
    return numbers


def _example(photograph: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [side, side, 3] and probabilities [side, side, 27]."""
    patches = -(-side // 14)
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-1, 1, (patches, patches, CLASSES)).astype(np.float32)
    spread = cosines.repeat(14, axis=0).repeat(14, axis=1)[:side, :side]
    weights = np.exp(TEMPERATURE * spread)
    return crops.square(photograph, side), weights / weights.sum(-1, keepdims=True)


def _seconds(image: np.ndarray, maps: np.ndarray) -> float:
    crf.mean_field(maps, image, iterations=0).block_until_ready()  # compiles
    start = time.perf_counter()
    crf.mean_field(maps, image).block_until_ready()
    return time.perf_counter() - start


def dense(maps: np.ndarray, image: np.ndarray, iterations: int = 10) -> np.ndarray:
    """The same mean field: all pairs, some rows of the kernel at a time."""
    height, width, classes = maps.shape
    device = torch.get_default_device()
    places = np.stack(np.indices((height, width)), axis=-1).reshape(-1, 2) / 67
    features = np.concatenate([places, image.reshape(-1, 3) / 3], axis=1)
    f = torch.from_numpy(features.astype(np.float32)).to(device)
    columns = list(f.T.contiguous())
    unary = torch.from_numpy(maps.reshape(-1, classes)).to(device).clamp(1e-5, 1).log()
    smooth = [_smoothing(length, device) for length in (height, width)]

    def times(q: torch.Tensor) -> torch.Tensor:
        parts = []
        for rows in f.split(ROWS):
            exponent = torch.zeros(len(rows), len(f))
            for row, column in zip(rows.T, columns, strict=True):
                exponent += (row[:, None] - column[None]).square_()
            # Underflow would cost MKL's exponential ten times as much.
            parts.append(exponent.mul_(-0.5).clamp_(min=LEAST_EXPONENT).exp_() @ q)
        return torch.cat(parts)

    root = times(torch.ones(len(f), 1)).rsqrt()
    q = unary.softmax(dim=1)
    for _ in range(iterations):
        grid = q.reshape(height, width, classes)
        near = torch.einsum("yh,xw,hwc->yxc", *smooth, grid).reshape(q.shape)
        q = (unary + 3 * near + 4 * root * times(root * q)).softmax(dim=1)
    return q.reshape(height, width, classes).cpu().numpy()


def _smoothing(length: int, device: torch.device) -> torch.Tensor:
    place = torch.arange(length, dtype=torch.float32, device=device)
    kernel = (-0.5 * (place[:, None] - place[None]).square()).exp()
    root = kernel.sum(dim=1).rsqrt()
    return kernel * root[:, None] * root[None]
