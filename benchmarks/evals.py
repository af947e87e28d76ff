"""What evaluations cost, beside transformers, PyTorch and FAISS.

python -m benchmarks.run class_tokens knn
"""

from collections.abc import Callable

import jax
import numpy as np

from benchmarks import synthetic
from benchmarks.timing import Numbers, in_turn, summary, tell
from sinder_jax import vit
from sinder_jax.evals import features, knn

SIDE = 224  # pixels, as k-NN and the linear probe see images
QUERIES_AT_ONCE = 256  # of the k-NN in PyTorch, as in dinov2/eval/knn.py


def bench_class_tokens(rounds: int, quick: bool) -> Numbers:
    """Compares a feature pass with transformers' Dinov2Model, S and L at 224 pixels."""
    names = {"dinov2_vits14": 32, "dinov2_vitl14": 8}  # images
    if jax.default_backend() != "cpu":
        names = dict.fromkeys(names, 64)
    if quick:
        names = {"dinov2_vits14": 2}
    numbers: Numbers = {}
    for name, count in names.items():
        numbers[name] = _class_tokens(name, count, rounds)
        tell(name, numbers[name])
    return numbers


def _class_tokens(name: str, count: int, rounds: int) -> Numbers:
    import torch

    from benchmarks import linear_probe, torch_device

    device = torch_device.prepare("highest")
    config = vit.CONFIGS[name]
    config = vit.ViTConfig(**{**config.as_dict(), "interpolate_offset": 0.0})
    params = synthetic.random_params(config)
    model = linear_probe.backbone(config, params).to(device)
    images = np.random.default_rng(1).standard_normal((count, SIDE, SIDE, 3))
    images = images.astype(np.float32)
    channels_first = np.ascontiguousarray(np.moveaxis(images, 3, 1))

    def theirs() -> np.ndarray:
        with torch.no_grad():
            found = model(torch.from_numpy(channels_first).to(device))
        return found.last_hidden_state[:, 0].cpu().numpy()

    extract = features.make_extract(
        config,
        params,
        blocks=features.last_blocks(config, 1),
        of=features.class_token,
        batch_axis=0,
        group=count if jax.default_backend() != "cpu" else min(count, 8),
    )

    def ours() -> np.ndarray:
        return np.asarray(extract(images))

    numbers = summary(in_turn(rounds, transformers=theirs, ours=ours), "transformers")
    numbers["images/s"] = {k: count / x for k, x in numbers["seconds"].items()}
    numbers["largest relative difference"] = _difference(ours(), theirs())
    return numbers


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def bench_knn(rounds: int, quick: bool) -> Numbers:
    """Compares the 200 neighbors of 5,000 queries among 100,000 features of ViT-S.

    The cosines are those of random features, the hardest case: all are close together.
    """
    import torch

    from benchmarks import torch_device

    device = torch_device.prepare("highest")
    rows, queries, k = (2_000, 300, 20) if quick else (100_000, 5_000, max(knn.KS))
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((rows, 384), np.float32)
    asked = rng.standard_normal((queries, 384), np.float32)
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["ours"] = knn.neighbors(bank, asked, k).rows

    def theirs() -> None:
        x, q = (
            torch.nn.functional.normalize(torch.from_numpy(each).to(device))
            for each in (bank, asked)
        )
        some = [(part @ x.T).topk(k)[1] for part in q.split(QUERIES_AT_ONCE)]
        found["PyTorch"] = torch.cat(some).cpu().numpy()

    calls: dict[str, Callable[[], None]] = {"PyTorch": theirs, "ours": ours}
    if faiss_version := _faiss_version():
        calls[f"FAISS {faiss_version}"] = lambda: found.update(
            FAISS=_faiss_neighbors(bank, asked, k)
        )
    numbers = summary(in_turn(rounds, **calls), "PyTorch")
    expected = np.sort(found["PyTorch"], axis=1)
    numbers["rows that are PyTorch's"] = {
        name: float((np.sort(each, axis=1) == expected).mean())
        for name, each in found.items()
    }
    return numbers


def _faiss_version() -> str:
    """Empty if FAISS is not installed: pip install faiss-cpu."""
    try:
        import faiss
    except ImportError:
        return ""
    return faiss.__version__


def _faiss_neighbors(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Exact search by inner product of normalized features."""
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    normalized = []
    for each in (bank, queries):
        copy = each.copy()
        faiss.normalize_L2(copy)
        normalized.append(copy)
    index.add(normalized[0])
    return index.search(normalized[1], k)[1]
