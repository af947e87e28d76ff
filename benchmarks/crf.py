"""The exact CRF, beside plain ones in PyTorch of all pairs of pixels.

    python -m benchmarks.run crf

Photographs are scikit-image's samples, resized as STEGO resizes; label maps are random
patches of 14 pixels, as sharp as a softmax at STEGO's temperature makes them. Time
depends on the colors of the image, which decide how many pairs of blocks are left.
PyTorch computes the kernel anew in every iteration, or keeps it as one matrix: 0.2 GB
at 84 x 84 pixels, 2.6 GB at 160 x 160, 393 GB at 560 x 560.
"""

import time

import numpy as np
import torch

from benchmarks import torch_device
from benchmarks.timing import Numbers, in_turn, summary, tell
from sinder_jax.data import crops, decode, listing
from sinder_jax.evals import crf

CLASSES = 27  # of Cityscapes
COMPARED = {"cpu": 84, "cuda": 160}  # pixels of a side
SIDES = {"cpu": (160, 320, 560), "cuda": (560,)}  # of one image, ours only
KEPT = "PyTorch, kernel kept"
TEMPERATURE = 2.0
ROWS = {"cpu": 128, "cuda": 512}  # of the kernel that PyTorch computes at a time
LEAST_EXPONENT = -80.0  # exp(-80) is 0 beside a row's sum, which is at least 1


def bench_crf(rounds: int, quick: bool) -> Numbers:
    """Ten iterations with 27 classes: the ratio, the pairs left, one image by size."""
    device = torch_device.prepare("highest")
    photographs = {
        path.stem: np.asarray(decode.read_rgb(path)) for path in listing.sample_images()
    }
    chosen = photographs["astronaut"]
    compared = 28 if quick else COMPARED[device.type]
    image, maps = _example(chosen, compared)
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["ours"] = np.asarray(crf.mean_field(maps, image))

    def theirs() -> None:
        found["PyTorch"] = dense(maps, image, device=device)

    def kept() -> None:
        found[KEPT] = dense(maps, image, device=device, keep=True)

    seconds = in_turn(rounds, **{"PyTorch": theirs, KEPT: kept, "ours": ours})
    numbers = summary(seconds, "PyTorch")
    numbers["pixels compared"] = compared**2
    numbers["largest difference of a marginal"] = {
        name: float(np.abs(found["ours"] - found[name]).max())
        for name in ("PyTorch", KEPT)
    }
    tell("crf, compared", numbers)
    side = 28 if quick else 320
    numbers[f"pairs left at {side} pixels"] = {
        name: crf.pairs_left(crops.square(pixels, side))
        for name, pixels in photographs.items()
    }
    numbers["seconds of one image, once"] = {
        f"{side} pixels": _seconds(*_example(chosen, side))
        for side in (() if quick else SIDES[device.type])
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


def dense(
    maps: np.ndarray,
    image: np.ndarray,
    iterations: int = 10,
    *,
    device: torch.device | None = None,
    keep: bool = False,
) -> np.ndarray:
    """The same mean field: all pairs, some rows of the kernel at a time.

    Args:
      maps: probabilities [height, width, classes].
      image: uint8 [height, width, 3].
      iterations: of the mean field.
      device: of PyTorch.
      keep: computes the kernel once.
    """
    height, width, classes = maps.shape
    places = np.stack(np.indices((height, width)), axis=-1).reshape(-1, 2) / 67
    features = np.concatenate([places, image.reshape(-1, 3) / 3], axis=1)
    f = torch.from_numpy(features.astype(np.float32)).to(device)
    columns = list(f.T.contiguous())
    unary = torch.from_numpy(maps.reshape(-1, classes)).to(device).clamp(1e-5, 1).log()
    smooth = [_smoothing(length, device) for length in (height, width)]

    def kernel(rows: torch.Tensor) -> torch.Tensor:
        exponent = torch.zeros(len(rows), len(f), device=device)
        for row, column in zip(rows.T, columns, strict=True):
            exponent += (row[:, None] - column[None]).square_()
        # Underflow would cost MKL's exponential ten times as much.
        return exponent.mul_(-0.5).clamp_(min=LEAST_EXPONENT).exp_()

    parts = f.split(ROWS[f.device.type])
    whole = torch.cat([kernel(rows) for rows in parts]) if keep else None

    def times(q: torch.Tensor) -> torch.Tensor:
        if whole is not None:
            return whole @ q
        return torch.cat([kernel(rows) @ q for rows in parts])

    root = times(torch.ones(len(f), 1, device=device)).rsqrt()
    q = unary.softmax(dim=1)
    for _ in range(iterations):
        grid = q.reshape(height, width, classes)
        near = torch.einsum("yh,xw,hwc->yxc", *smooth, grid).reshape(q.shape)
        q = (unary + 3 * near + 4 * root * times(root * q)).softmax(dim=1)
    return q.reshape(height, width, classes).cpu().numpy()


def _smoothing(length: int, device: torch.device | None) -> torch.Tensor:
    place = torch.arange(length, dtype=torch.float32, device=device)
    kernel = (-0.5 * (place[:, None] - place[None]).square()).exp()
    root = kernel.sum(dim=1).rsqrt()
    return kernel * root[:, None] * root[None]
