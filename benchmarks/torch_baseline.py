"""The baseline: the authors' repair step in PyTorch, operation for operation.

    image --all blocks up to the first defect, kernels rebuilt in each--> loss
    loss --back through all of them--> ∂loss/∂ε --drop the inactive--> SGD

Written from the paper (arXiv:2407.16826) and from what the released code computes, not
from its text. Every forward pass rebuilds every kernel, q and k included, by two dense
products U·diag(σ + ε)·Vᵀ; attention is plain softmax; the backward pass reaches the ε
of every block that ran, and gradients outside the window are dropped. The tests compare
it with the recorded runs.

    python -m benchmarks.torch_baseline       # counts the operations of one giant block
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch.utils.flop_counter import FlopCounterMode

from sinder_jax import factor, families, kernels, loss, param_tree, vit
from sinder_jax.state import RepairOptions

Rebuild = Callable[..., torch.Tensor]


def rebuild_dense(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """W [out, in] = U·diag(s)·Vᵀ by two dense products, as the authors do."""
    return u @ torch.diag(s) @ v.T


def rebuild_scaled(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same kernel by one product: (U·s)·Vᵀ."""
    return (u * s) @ v.T


class Kernel(NamedTuple):
    """A factored kernel: u [out, S], sigma [S], v [in, S] and the trainable ε [S]."""

    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor
    eps: torch.Tensor


class StepResult(NamedTuple):
    """Block of the defect or -1, loss or nan, number of outliers."""

    layer: int
    loss: float
    num_outliers: int


def resample_positions(
    grid: Float[torch.Tensor, "M M D"],
    rows: int,
    columns: int,
    *,
    antialias: bool,
    offset: float,
) -> Float[torch.Tensor, "{rows} {columns} D"]:
    """The stored position embedding of the patches, resampled as the hub does it.

    After DINOv2's `interpolate_pos_encoding`: a grid equal to the stored one is used
    untouched. Otherwise an offset enters as a scale factor, (rows + offset)/M, which
    PyTorch then samples by although the size is not quite in that ratio; offset 0 asks
    for the size, and the scale is exact.

    Args:
      grid: stored embedding of M x M patches.
      rows: wanted rows, in patches.
      columns: wanted columns, in patches.
      antialias: PyTorch's `antialias=True`.
      offset: DINOv2's `interpolate_offset`.
    """
    stored = len(grid)
    if (rows, columns) == (stored, stored):
        return grid
    scale = ((rows + offset) / stored, (columns + offset) / stored)
    resampled = F.interpolate(
        grid.permute(2, 0, 1)[None],
        size=None if offset else (rows, columns),
        scale_factor=scale if offset else None,
        mode="bicubic",
        antialias=antialias,
    )
    return resampled[0].permute(1, 2, 0)


class Baseline:
    """A model under repair, one image at a time.

    Args:
      config: the architecture.
      params: the params tree of the original model, NumPy float32.
      factors: factors of the trainable kernels.
      qk: factors of the query and key kernels, by (block, "q" or "k").
      directions: singular defect directions [L, D].
      options: the repair's options.
      rebuild: how a kernel is built from its factors.
    """

    def __init__(
        self,
        config: vit.ViTConfig,
        params: Mapping[str, Any],
        factors: factor.Factors,
        qk: Mapping[tuple[int, str], factor.KernelFactors],
        directions: np.ndarray,
        options: RepairOptions,
        rebuild: Rebuild = rebuild_dense,
    ):
        self.config, self.options, self.rebuild = config, options, rebuild
        frozen, _ = kernels.split(config, params)
        self._frozen = _as_torch(frozen)
        self._directions = F.normalize(_tensor(directions), dim=-1, eps=1e-12)
        self.kernels = [self._block(factors, qk, i) for i in range(config.depth)]
        trained = [
            kernel.eps
            for block in self.kernels
            for kernel in block.values()
            if kernel.eps.requires_grad
        ]
        self._sgd = torch.optim.SGD(trained, options.lr, options.momentum)

    def _block(self, factors: Any, qk: Any, block: int) -> dict[str, Kernel]:
        kernels = {}
        for name in ("q", "k"):
            u, sigma, v = (_tensor(x) for x in qk[block, name])
            kernels[f"attn/{name}"] = Kernel(u, sigma, v, torch.zeros_like(sigma))
        for name in factors.sigma:
            parts = (factors.u, factors.sigma, factors.v)
            u, sigma, v = (_tensor(part[name][block]) for part in parts)
            eps = torch.zeros_like(sigma, requires_grad=True)
            kernels[name] = Kernel(u, sigma, v, eps)
        return kernels

    def step(self, image: np.ndarray) -> StepResult:
        """Takes one SGD step on an image [height, width, 3], normalized float32."""
        tokens = self.embed(image)
        rows = image.shape[0] // self.config.patch_size
        for i in range(self.config.depth):
            tokens = self.block(i, tokens)
            patches = tokens[0, 1 + self.config.num_register_tokens :]
            patches = patches.reshape(rows, -1, self.config.embed_dim)
            value, outliers = self.neighbor_loss(patches, self._directions[i])
            if outliers >= self.options.min_outliers:
                self._update(value, i)
                return StepResult(i, float(value.detach()), outliers)
        return StepResult(-1, float("nan"), 0)

    def _update(self, value: torch.Tensor, layer: int) -> None:
        self._sgd.zero_grad(set_to_none=True)
        value.backward()
        active = self.options.active_blocks or self.config.depth
        for block in self.kernels[: max(0, layer + 1 - active)]:
            for kernel in block.values():
                kernel.eps.grad = None  # SGD skips a parameter without a gradient
        self._sgd.step()

    def embed(self, image: np.ndarray) -> torch.Tensor:
        """Tokens [1, T, D] before the first block."""
        p, patch = self._frozen, self.config.patch_size
        pixels = _tensor(image).permute(2, 0, 1)[None]
        weight = p["patch_embed"]["kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(pixels, weight, p["patch_embed"]["bias"], stride=patch)
        rows, columns = x.shape[2:]
        grid = resample_positions(
            p["pos_embed"][0, 1:].reshape(
                self.config.grid_size, self.config.grid_size, -1
            ),
            rows,
            columns,
            antialias=self.config.interpolate_antialias,
            offset=self.config.interpolate_offset,
        )
        x = x.flatten(2).transpose(1, 2) + grid.reshape(1, rows * columns, -1)
        first = [p["cls_token"] + p["pos_embed"][:, :1]]
        if self.config.num_register_tokens:
            first.append(p["register_tokens"])
        return torch.cat([*first, x], dim=1)

    def block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Applies block i with kernels rebuilt from their factors."""
        p, kernels = _at(self._frozen["blocks"], i), self.kernels[i]
        weights = {
            name: self.rebuild(k.u, k.sigma + k.eps, k.v) for name, k in kernels.items()
        }
        y = self.attention(p["attn"], weights, self.norm(p["norm1"], x))
        x = x + y * p["ls1"]["gamma"]
        y = self.ffn(p["mlp"], weights, self.norm(p["norm2"], x))
        return x + y * p["ls2"]["gamma"]

    def norm(self, p: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
        """LayerNorm."""
        shape = (self.config.embed_dim,)
        epsilon = families.of(self.config).norm_epsilon
        return F.layer_norm(x, shape, p["scale"], p["bias"], epsilon)

    def attention(
        self, p: Mapping[str, Any], weights: Mapping[str, Any], x: torch.Tensor
    ) -> torch.Tensor:
        """Plain softmax attention; one product computes q, k and v."""
        batch, length, width = x.shape
        heads = self.config.num_heads
        fused = torch.cat([weights[f"attn/{name}"] for name in "qkv"])
        bias = torch.cat([p["qk"]["bias"], p["v"]["bias"]])
        qkv = F.linear(x, fused, bias)
        qkv = qkv.reshape(batch, length, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1)
        mixed = logits.softmax(dim=-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return F.linear(mixed, weights["attn/proj"], p["proj"]["bias"])

    def ffn(
        self, p: Mapping[str, Any], weights: Mapping[str, Any], x: torch.Tensor
    ) -> torch.Tensor:
        """SwiGLU, or the MLP with exact GELU."""
        if self.config.ffn_layer == "mlp":
            h = F.gelu(F.linear(x, weights["mlp/fc1"], p["fc1"]["bias"]))
            return F.linear(h, weights["mlp/fc2"], p["fc2"]["bias"])
        a, b = F.linear(x, weights["mlp/w12"], p["w12"]["bias"]).chunk(2, dim=-1)
        return F.linear(F.silu(a) * b, weights["mlp/w3"], p["w3"]["bias"])

    def neighbor_loss(
        self, tokens: torch.Tensor, direction: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """Loss and number of the outliers among patch tokens [H, W, D]."""
        window, border = self.options.window, self.options.window // 2
        height, width, _ = tokens.shape
        fixed = tokens.detach()
        logits = -(F.normalize(fixed, dim=-1, eps=1e-12) @ direction).abs()
        threshold = logits.mean() - self.options.mask_thr * logits.std()
        inner = (slice(border, height - border), slice(border, width - border))
        rows, columns = torch.where(logits[inner] < threshold)
        if len(rows) < self.options.min_outliers:
            return tokens.sum() * 0, len(rows)
        # Windows around the outliers: [outliers, window·window, …].
        offsets = torch.arange(window)
        around = (rows[:, None, None] + offsets[None, :, None]).expand(-1, -1, window)
        beside = (columns[:, None, None] + offsets[None, None, :]).expand(
            -1, window, -1
        )
        weights = torch.softmax(
            logits[around, beside].flatten(1) / self.options.temperature, dim=1
        )
        weights = weights * _tensor(loss.GAUSSIANS[window]).flatten()
        weights = weights / weights.sum(dim=1, keepdim=True)
        target = (weights[..., None] * fixed[around, beside].flatten(1, 2)).sum(dim=1)
        alpha = fixed[inner].norm(dim=-1).mean()
        distance = (tokens[inner][rows, columns] - target).norm(dim=-1)
        return distance.mean() / alpha, len(rows)


def qk_factors(
    config: vit.ViTConfig, params: Mapping[str, Any]
) -> dict[tuple[int, str], factor.KernelFactors]:
    """Factors of the query and key kernels, which the authors rebuild as well."""
    found = {}
    for i, kernel in enumerate(np.asarray(params["blocks"]["attn"]["qkv"]["kernel"])):
        q, k, _ = np.split(kernel, 3, axis=1)
        found[i, "q"] = factor.factorize_kernel(q)
        found[i, "k"] = factor.factorize_kernel(k)
    return found


def count_operations(rebuild: Rebuild = rebuild_dense) -> dict[str, float]:
    """GFLOP of one giant block at 518 pixels, forward and backward.

    PyTorch counts them on meta tensors, which have shapes but no data. A multiplication
    and an addition count as two.
    """
    config = vit.ViTConfig(1536, 1, 24, "swiglu")
    with torch.device("meta"):
        baseline = Baseline.__new__(Baseline)
        baseline.config, baseline.rebuild = config, rebuild
        width, hidden = config.embed_dim, config.hidden_dim
        shapes = dict.fromkeys(
            ("attn/q", "attn/k", "attn/v", "attn/proj"), (width, width)
        )
        shapes |= {"mlp/w12": (2 * hidden, width), "mlp/w3": (width, hidden)}
        baseline.kernels = [
            {
                name: Kernel(
                    torch.empty(out, width),
                    torch.empty(width),
                    torch.empty(into, width),
                    torch.empty(width, requires_grad=name not in ("attn/q", "attn/k")),
                )
                for name, (out, into) in shapes.items()
            }
        ]
        shapes_of = param_tree.shapes(config)["blocks"]
        empty = _map(lambda leaf: torch.empty(leaf.shape), shapes_of)
        empty["attn"] |= {
            "qk": {"bias": torch.empty(1, 2 * width)},
            "v": {"bias": torch.empty(1, width)},
        }
        baseline._frozen = {"blocks": empty}
        tokens = torch.empty(1, 1 + config.grid_size**2, width, requires_grad=True)
        forward, backward = (
            FlopCounterMode(display=False),
            FlopCounterMode(display=False),
        )
        with forward:
            out = baseline.block(0, tokens)
        with backward:
            out.sum().backward()
    return {
        "forward": forward.get_total_flops() / 1e9,
        "backward": backward.get_total_flops() / 1e9,
    }


def set_device(cpu: bool) -> None:
    """Puts what follows on the CPU or on the GPU."""
    torch.set_default_device("cpu" if cpu else "cuda")


def wait() -> None:
    """Waits until the default device has done all that it was given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def set_precision(precision: str) -> None:
    """Makes float32 products TF32 on a GPU for "high", and exact for "highest"."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def _tensor(array: Any) -> torch.Tensor:
    array = np.array(array, np.float32)
    return torch.as_tensor(array, device=torch.get_default_device())


def _as_torch(tree: Any) -> Any:
    return _map(_tensor, tree)


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _map(function, part) for name, part in tree.items()}
    return function(tree)


def _at(tree: Any, i: int) -> Any:
    return _map(lambda stacked: stacked[i], tree)


if __name__ == "__main__":
    ways = {"dense": rebuild_dense, "scaled": rebuild_scaled}
    counted = {name: count_operations(rebuild) for name, rebuild in ways.items()}
    print(json.dumps({"GFLOP of a giant block, by rebuilding": counted}, indent=2))
