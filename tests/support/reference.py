"""The whole method once more, in plain NumPy float64: what the fast library is held to.

    image -> embed -> block 0 .. block L-1 -> directions, outliers, neighbor loss
          -> gradient by hand -> SGD on epsilon -> the authors' loop

It shares no code with `sinder_jax`, reads PyTorch-named DINOv2 state dicts without the
converter, and prefers the definition to the shortcut wherever the two differ: kernels
are rebuilt as U diag(sigma + eps) V^T, every block is differentiated, the linear fit of
an FFN is an integral over E[h x^T], and loops run over single images and patches.

Shapes follow the glossary of the library: T tokens, D width, F FFN width, H x W patch
grid, L blocks, S singular values. A linear map is the matrix that multiplies a column.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from scipy.special import erf

F64 = Float64[np.ndarray, "..."]
Tokens = Float64[np.ndarray, "T D"]
Grid = Float64[np.ndarray, "H W D"]

LAYER_NORM_EPS = 1e-6
GAUSSIAN = {
    3: np.outer([1, 2, 1], [1, 2, 1]) / 16,
    5: np.array(
        [
            [1, 4, 7, 4, 1],
            [4, 16, 26, 16, 4],
            [7, 26, 41, 26, 7],
            [4, 16, 26, 16, 4],
            [1, 4, 7, 4, 1],
        ]
    )
    / 273,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A DINOv2 state dict in float64, and what the state dict cannot tell."""

    state: Mapping[str, np.ndarray]
    embed_dim: int
    depth: int
    num_heads: int
    ffn_layer: str = "mlp"  # or "swiglu"
    img_size: int = 518
    patch_size: int = 14
    num_register_tokens: int = 0
    interpolate_antialias: bool = False
    interpolate_offset: float = 0.1

    def __post_init__(self) -> None:
        state = {k: np.asarray(v, np.float64) for k, v in self.state.items()}
        object.__setattr__(self, "state", state)

    @classmethod
    def from_golden(cls, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> "Model":
        """The model of a recording: the arrays of its npz, the fields of its json."""
        state = {k[6:]: v for k, v in arrays.items() if k.startswith("state/")}
        names = [field.name for field in dataclasses.fields(cls)[1:]]
        fields = {name: meta[name] for name in names}
        fields["ffn_layer"] = fields["ffn_layer"].removesuffix("fused")
        return cls(state, **fields)

    def block(self, index: int, name: str) -> F64:
        """One tensor of a block, e.g. `block(3, "norm1.weight")`."""
        return self.state[f"blocks.{index}.{name}"]


# --- Layers, each beside its derivative -----------------------------------------------


def dense(model: Model, block: int, name: str, x: F64) -> F64:
    """y = W x + b for every token; PyTorch weights are [out, in]."""
    weight, bias = (model.block(block, f"{name}.{part}") for part in ("weight", "bias"))
    return x @ weight.T + bias


def dense_backward(
    model: Model, block: int, name: str, x: F64, dy: F64
) -> tuple[F64, F64]:
    """dx = W^T dy for every token, and dW = sum over tokens of dy x^T."""
    return dy @ model.block(block, f"{name}.weight"), dy.T @ x


def layer_norm(x: F64, scale: F64, bias: F64) -> F64:
    """(x - mean) / sqrt(var + 1e-6) * scale + bias, var divided by D."""
    centered = x - x.mean(-1, keepdims=True)
    variance = (centered**2).mean(-1, keepdims=True)
    return centered / np.sqrt(variance + LAYER_NORM_EPS) * scale + bias


def layer_norm_backward(x: F64, scale: F64, dy: F64) -> F64:
    """dx = (g - mean(g) - xhat mean(g xhat)) / std, with g = scale dy."""
    xhat = layer_norm(x, np.ones_like(scale), np.zeros_like(scale))
    std = np.sqrt(x.var(-1, keepdims=True) + LAYER_NORM_EPS)
    g = scale * dy
    along = (g * xhat).mean(-1, keepdims=True)
    return (g - g.mean(-1, keepdims=True) - xhat * along) / std


def gelu(a: F64) -> F64:
    """a Phi(a), the exact one."""
    return a * (1 + erf(a / np.sqrt(2))) / 2


def gelu_derivative(a: F64) -> F64:
    """Phi(a) + a phi(a)."""
    density = np.exp(-(a**2) / 2) / np.sqrt(2 * np.pi)
    return (1 + erf(a / np.sqrt(2))) / 2 + a * density


def sigmoid(a: F64) -> F64:
    """1 / (1 + exp(-a)), written so that no exponential overflows."""
    return (1 + np.tanh(a / 2)) / 2


def silu(a: F64) -> F64:
    """a sigmoid(a)."""
    return a * sigmoid(a)


def silu_derivative(a: F64) -> F64:
    """s + a s (1 - s), s = sigmoid(a)."""
    s = sigmoid(a)
    return s + a * s * (1 - s)


# --- Embedding ------------------------------------------------------------------------


def cubic(x: F64 | float, a: float) -> F64:
    """Keys' cubic convolution kernel with free coefficient a; zero from |x| = 2 on."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_weights(
    stored: int, size: int, *, offset: float, antialias: bool
) -> Float64[np.ndarray, "size stored"]:
    """One axis of PyTorch's bicubic resize: output = weights @ input.

    Output j sits at (j + 1/2) stored / (size + offset) - 1/2. With antialias PyTorch on
    the CPU copies an axis of unchanged length, whatever the offset.
    """
    if antialias and size == stored:
        return np.eye(stored)
    ratio = stored / (size + offset)
    center = (np.arange(size) + 0.5) * ratio - 0.5
    if antialias:
        distance = np.arange(stored)[None, :] - center[:, None]
        weights = cubic(distance / max(ratio, 1.0), -0.5)
        return weights / weights.sum(1, keepdims=True)
    weights = np.zeros((size, stored))
    for j, position in enumerate(center):
        for tap in np.floor(position) + np.arange(-1, 3):
            i = int(np.clip(tap, 0, stored - 1))
            weights[j, i] += cubic(tap - position, -0.75)
    return weights


def position_embedding(
    model: Model, height: int, width: int
) -> Float64[np.ndarray, "_ D"]:
    """Class row as stored, grid resized to H x W unless it has that shape already."""
    stored = model.state["pos_embed"][0]
    side = model.img_size // model.patch_size
    if (height, width) == (side, side):
        return stored
    rows, columns = (
        resize_weights(
            side,
            size,
            offset=model.interpolate_offset,
            antialias=model.interpolate_antialias,
        )
        for size in (height, width)
    )
    grid = stored[1:].reshape(side, side, -1)
    grid = np.einsum("hi,wj,ijd->hwd", rows, columns, grid)
    return np.concatenate([stored[:1], grid.reshape(height * width, -1)])


def grid_shape(model: Model, image: np.ndarray) -> tuple[int, int]:
    """Patch rows and columns of an image [3, height, width]."""
    return image.shape[1] // model.patch_size, image.shape[2] // model.patch_size


def embed(model: Model, image: np.ndarray) -> Tokens:
    """Tokens [cls, registers, patches] of an image [3, height, width]."""
    rows, columns = grid_shape(model, image)
    side = model.patch_size
    pixels = np.asarray(image, np.float64).reshape(3, rows, side, columns, side)
    weight = model.state["patch_embed.proj.weight"]
    patches = np.einsum("chpwq,dcpq->hwd", pixels, weight, optimize=True)
    patches = patches.reshape(rows * columns, -1) + model.state["patch_embed.proj.bias"]
    tokens = np.concatenate([model.state["cls_token"][0], patches])
    tokens = tokens + position_embedding(model, rows, columns)
    registers = model.state.get("register_tokens", np.zeros((1, 0, model.embed_dim)))
    return np.concatenate([tokens[:1], registers[0], tokens[1:]])


# --- Blocks ---------------------------------------------------------------------------


def split_heads(model: Model, x: Tokens) -> Float64[np.ndarray, "M T K"]:
    """[T, D] -> [M, T, K]: the head is the slow index of a channel."""
    return x.reshape(len(x), model.num_heads, -1).swapaxes(0, 1)


def merge_heads(x: Float64[np.ndarray, "M T K"]) -> Tokens:
    """[M, T, K] -> [T, D], undoing `split_heads`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def attention_parts(model: Model, block: int, x: Tokens) -> tuple[F64, F64, F64, F64]:
    """q, k, v per head and P = softmax(q k^T / sqrt(K)), of normalized tokens x."""
    qkv = dense(model, block, "attn.qkv", x)
    q, k, v = (split_heads(model, part) for part in np.split(qkv, 3, axis=1))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return q, k, v, weights / weights.sum(-1, keepdims=True)


def attention(model: Model, block: int, x: Tokens) -> Tokens:
    """W_proj (P v) + b_proj."""
    _, _, v, p = attention_parts(model, block, x)
    return dense(model, block, "attn.proj", merge_heads(p @ v))


def attention_backward(
    model: Model, block: int, x: Tokens, dy: Tokens
) -> tuple[Tokens, dict[str, F64]]:
    """dx and the gradients of the value and projection kernels."""
    q, k, v, p = attention_parts(model, block, x)
    do, dproj = dense_backward(model, block, "attn.proj", merge_heads(p @ v), dy)
    do = split_heads(model, do)
    dp = do @ v.swapaxes(1, 2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    dq, dk, dv = ds @ k, ds.swapaxes(1, 2) @ q, p.swapaxes(1, 2) @ do
    dqkv = np.concatenate([merge_heads(part) for part in (dq, dk, dv)], axis=1)
    dx, dweight = dense_backward(model, block, "attn.qkv", x, dqkv)
    return dx, {"attn/v": dweight[2 * model.embed_dim :], "attn/proj": dproj}


def hidden(model: Model, block: int, x: F64) -> F64:
    """The FFN's hidden layer: GELU(fc1 x), or silu(a) b with (a, b) = w12 x."""
    if model.ffn_layer == "mlp":
        return gelu(dense(model, block, "mlp.fc1", x))
    a, b = np.split(dense(model, block, "mlp.w12", x), 2, axis=1)
    return silu(a) * b


def ffn(model: Model, block: int, x: F64) -> F64:
    """fc2 or w3 of the hidden layer."""
    name = "mlp.fc2" if model.ffn_layer == "mlp" else "mlp.w3"
    return dense(model, block, name, hidden(model, block, x))


def ffn_backward(
    model: Model, block: int, x: Tokens, dy: Tokens
) -> tuple[Tokens, dict[str, F64]]:
    """dx and the gradients of both FFN kernels."""
    h = hidden(model, block, x)
    if model.ffn_layer == "mlp":
        dh, dfc2 = dense_backward(model, block, "mlp.fc2", h, dy)
        da = dh * gelu_derivative(dense(model, block, "mlp.fc1", x))
        dx, dfc1 = dense_backward(model, block, "mlp.fc1", x, da)
        return dx, {"mlp/fc1": dfc1, "mlp/fc2": dfc2}
    dh, dw3 = dense_backward(model, block, "mlp.w3", h, dy)
    a, b = np.split(dense(model, block, "mlp.w12", x), 2, axis=1)
    dab = np.concatenate([dh * b * silu_derivative(a), dh * silu(a)], axis=1)
    dx, dw12 = dense_backward(model, block, "mlp.w12", x, dab)
    return dx, {"mlp/w12": dw12, "mlp/w3": dw3}


def normalized(model: Model, block: int, name: str, x: F64) -> F64:
    """LayerNorm "norm1" or "norm2" of a block."""
    scale = model.block(block, f"{name}.weight")
    return layer_norm(x, scale, model.block(block, f"{name}.bias"))


def after_attention(model: Model, block: int, x: Tokens) -> Tokens:
    """x + gamma1 Attn(LN1 x)."""
    gamma = model.block(block, "ls1.gamma")
    return x + gamma * attention(model, block, normalized(model, block, "norm1", x))


def block_forward(model: Model, block: int, x: Tokens) -> Tokens:
    """x += gamma1 Attn(LN1 x); x += gamma2 FFN(LN2 x)."""
    x = after_attention(model, block, x)
    gamma = model.block(block, "ls2.gamma")
    return x + gamma * ffn(model, block, normalized(model, block, "norm2", x))


def block_backward(
    model: Model, block: int, x: Tokens, dy: Tokens
) -> tuple[Tokens, dict[str, F64]]:
    """dx and the gradients of the four trainable kernels, of a block with input x."""
    middle = after_attention(model, block, x)
    dbranch, ffn_grads = ffn_backward(
        model,
        block,
        normalized(model, block, "norm2", middle),
        dy * model.block(block, "ls2.gamma"),
    )
    dy = dy + layer_norm_backward(middle, model.block(block, "norm2.weight"), dbranch)
    dbranch, attention_grads = attention_backward(
        model,
        block,
        normalized(model, block, "norm1", x),
        dy * model.block(block, "ls1.gamma"),
    )
    dx = dy + layer_norm_backward(x, model.block(block, "norm1.weight"), dbranch)
    return dx, attention_grads | ffn_grads


def tokens_after_every_block(
    model: Model, image: np.ndarray
) -> Float64[np.ndarray, "stages T D"]:
    """The embedded tokens, then the raw tokens after block 0, 1, .. L-1."""
    tokens = [embed(model, image)]
    for block in range(model.depth):
        tokens.append(block_forward(model, block, tokens[-1]))
    return np.stack(tokens)


def features(model: Model, image: np.ndarray) -> Tokens:
    """All tokens of the last block after the final LayerNorm."""
    last = tokens_after_every_block(model, image)[-1]
    return layer_norm(last, model.state["norm.weight"], model.state["norm.bias"])


def patch_grid(model: Model, tokens: Tokens, shape: tuple[int, int]) -> Grid:
    """The patch tokens as [H, W, D]."""
    return tokens[1 + model.num_register_tokens :].reshape(*shape, -1)


# --- Linear maps and singular defect directions (paper, section 2) --------------------


def centering(width: int) -> Float64[np.ndarray, "D D"]:
    """C = I - 11^T / D, what LayerNorm does before it divides."""
    return np.eye(width) - 1 / width


def attention_map(model: Model, block: int) -> Float64[np.ndarray, "D D"]:
    """A = I + diag(gamma1) W_proj W_v diag(g1) C: equal tokens pass P unchanged."""
    w_v = model.block(block, "attn.qkv.weight")[2 * model.embed_dim :]
    branch = model.block(block, "attn.proj.weight") @ w_v
    branch = branch * model.block(block, "norm1.weight")
    branch = model.block(block, "ls1.gamma")[:, None] * branch
    return np.eye(model.embed_dim) + branch @ centering(model.embed_dim)


def attention_offset(model: Model, block: int) -> Float64[np.ndarray, " D"]:
    """b = gamma1 (W_proj (W_v beta1 + b_v) + b_proj), the constant beside A."""
    value = slice(2 * model.embed_dim, None)
    v = model.block(block, "attn.qkv.weight")[value] @ model.block(block, "norm1.bias")
    v = v + model.block(block, "attn.qkv.bias")[value]
    projected = model.block(block, "attn.proj.weight") @ v
    return model.block(block, "ls1.gamma") * (
        projected + model.block(block, "attn.proj.bias")
    )


def hidden_fit(model: Model, block: int) -> Float64[np.ndarray, "F D"]:
    """J = E[h x^T], the least-squares fit of the hidden layer on x ~ N(0, I).

    A unit's gate is a = b + |w| z with z = w.x / |w| ~ N(0, 1), so the part of E[h x]
    along w is an integral over z, here a trapezoidal sum over +-12 standard deviations.
    A SwiGLU unit multiplies by c = b2 + s z + r.x, r orthogonal to w: r adds E[silu] r.
    """
    name = "mlp.fc1" if model.ffn_layer == "mlp" else "mlp.w12"
    parts = 1 if model.ffn_layer == "mlp" else 2
    weights = np.split(model.block(block, f"{name}.weight"), parts)
    biases = np.split(model.block(block, f"{name}.bias"), parts)
    z = np.linspace(-12, 12, 4_001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    norm = np.linalg.norm(weights[0], axis=1, keepdims=True)
    unit = weights[0] / np.where(norm > 0, norm, 1.0)  # w = 0: the gate is a constant
    gate = biases[0][:, None] + norm * z
    if model.ffn_layer == "mlp":
        return (gelu(gate) @ (density * z))[:, None] * unit
    slope = (weights[1] * unit).sum(1, keepdims=True)
    factor = biases[1][:, None] + slope * z
    along = ((silu(gate) * factor) @ (density * z))[:, None]
    across = (silu(gate) @ density)[:, None]
    return along * unit + across * (weights[1] - slope * unit)


def hidden_fit_monte_carlo(
    model: Model, block: int, rng: np.random.Generator, num_probes: int
) -> Float64[np.ndarray, "F D"]:
    """The authors' way: least squares without intercept on `num_probes` random x."""
    x = rng.standard_normal((num_probes, model.embed_dim))
    return np.linalg.lstsq(x, hidden(model, block, x), rcond=None)[0].T


def ffn_map(model: Model, block: int, fit: F64 | None = None) -> F64:
    """M = I + diag(gamma2) W_out J diag(g2) C; `fit` replaces the exact J [F, D]."""
    name = "mlp.fc2.weight" if model.ffn_layer == "mlp" else "mlp.w3.weight"
    fit = hidden_fit(model, block) if fit is None else fit
    branch = model.block(block, name) @ fit * model.block(block, "norm2.weight")
    branch = model.block(block, "ls2.gamma")[:, None] * branch
    return np.eye(model.embed_dim) + branch @ centering(model.embed_dim)


def block_map(model: Model, block: int, fit: F64 | None = None) -> F64:
    """E = M A."""
    return ffn_map(model, block, fit) @ attention_map(model, block)


def singular_defect_directions(
    model: Model, fits: Sequence[F64] | None = None
) -> Float64[np.ndarray, "L D"]:
    """Leading left singular vector of E_i .. E_0 for each block i; signs arbitrary."""
    product = np.eye(model.embed_dim)
    directions = []
    for block in range(model.depth):
        fit = None if fits is None else fits[block]
        product = block_map(model, block, fit) @ product
        product /= np.linalg.norm(product)  # a positive factor turns no singular vector
        directions.append(np.linalg.svd(product)[0][:, 0])
    return np.stack(directions)


# --- Outliers, target, loss -----------------------------------------------------------


class NeighborLoss(NamedTuple):
    """The loss of one block and image, and what it was made of."""

    loss: float
    alpha: float  # mean norm of the interior tokens; nan without interior
    mask: Bool[np.ndarray, "H W"]
    target: Grid  # nan on the border


def outlier_logits(
    patches: Grid, direction: Float64[np.ndarray, " D"]
) -> Float64[np.ndarray, "H W"]:
    """-|cos(x, direction)| (equation 5), with rows x / max(|x|, 1e-12)."""
    direction = direction / max(np.linalg.norm(direction), 1e-12)
    norms = np.maximum(np.linalg.norm(patches, axis=-1), 1e-12)
    return -np.abs(patches @ direction) / norms


def interior(shape: tuple[int, ...], window: int) -> Bool[np.ndarray, "H W"]:
    """True where a whole window fits: all but a border of window // 2 patches."""
    border = window // 2
    inside = np.zeros(shape[:2], bool)
    inside[border : shape[0] - border, border : shape[1] - border] = True
    return inside


def outlier_mask(
    logits: Float64[np.ndarray, "H W"], *, mask_thr: float, window: int
) -> Bool[np.ndarray, "H W"]:
    """logit < mean - mask_thr std over all patches (ddof=1), never on the border."""
    threshold = logits.mean() - mask_thr * logits.std(ddof=1)
    return (logits < threshold) & interior(logits.shape, window)


def neighbor_target(
    patches: Grid,
    logits: Float64[np.ndarray, "H W"],
    *,
    window: int,
    temperature: float,
) -> Grid:
    """Mean of the window's tokens, weights Gaussian exp(logit / tau) (equation 7)."""
    border = window // 2
    target = np.full(patches.shape, np.nan)
    for row, column in np.argwhere(interior(logits.shape, window)):
        around = np.s_[
            row - border : row + border + 1, column - border : column + border + 1
        ]
        near = logits[around]
        weights = np.exp((near - near.max()) / temperature) * GAUSSIAN[window]
        weights /= weights.sum()
        target[row, column] = (weights[:, :, None] * patches[around]).sum((0, 1))
    return target


def learning_targets(
    patches: Grid, direction: Float64[np.ndarray, " D"], *, window: int, tau: float
) -> Grid:
    """`neighbor_target` of every patch; near the border the window is cut off."""
    logits, border = outlier_logits(patches, direction), window // 2
    height, width = logits.shape
    target = np.empty_like(patches)
    for row in range(height):
        for column in range(width):
            near = [
                (r, c, GAUSSIAN[window][r - row + border, c - column + border])
                for r in range(max(row - border, 0), min(row + border + 1, height))
                for c in range(max(column - border, 0), min(column + border + 1, width))
            ]
            lowest = max(logits[r, c] for r, c, _ in near)
            weights = [g * np.exp((logits[r, c] - lowest) / tau) for r, c, g in near]
            tokens = np.stack([patches[r, c] for r, c, _ in near])
            target[row, column] = np.average(tokens, axis=0, weights=weights)
    return target


def neighbor_loss(
    patches: Grid,
    direction: Float64[np.ndarray, " D"],
    *,
    mask_thr: float = 4.0,
    window: int = 3,
    temperature: float = 0.1,
) -> NeighborLoss:
    """Mean over outliers of |x - target|, over alpha; 0 without outliers."""
    logits = outlier_logits(patches, direction)
    mask = outlier_mask(logits, mask_thr=mask_thr, window=window)
    target = neighbor_target(patches, logits, window=window, temperature=temperature)
    norms = np.linalg.norm(patches, axis=-1)[interior(logits.shape, window)]
    alpha = float(norms.mean()) if norms.size else float("nan")
    distances = np.linalg.norm((patches - target)[mask], axis=-1)
    loss = float(distances.mean()) / alpha if mask.any() else 0.0
    return NeighborLoss(loss, alpha, mask, target)


def neighbor_loss_backward(patches: Grid, result: NeighborLoss) -> Grid:
    """(x - target) / |x - target| / (outliers alpha); mask, target, alpha constant."""
    dx = np.zeros_like(patches)
    if result.mask.any():
        error = (patches - result.target)[result.mask]
        norms = np.linalg.norm(error, axis=-1, keepdims=True)
        # at distance 0 the gradient is 0, as PyTorch has it
        unit = error / np.where(norms == 0, 1.0, norms)
        dx[result.mask] = unit / (result.mask.sum() * result.alpha)
    return dx


# --- Trainable kernels ----------------------------------------------------------------


class Factors(NamedTuple):
    """W = U diag(sigma) V^T per kernel name, stacked over blocks."""

    u: dict[str, Float64[np.ndarray, "L out S"]]
    sigma: dict[str, Float64[np.ndarray, "L S"]]
    v: dict[str, Float64[np.ndarray, "L in S"]]


def trainable_kernels(model: Model) -> tuple[str, ...]:
    """The four kernels of a block whose singular values train."""
    ffn_names = ("fc1", "fc2") if model.ffn_layer == "mlp" else ("w12", "w3")
    return ("attn/v", "attn/proj", *(f"mlp/{name}" for name in ffn_names))


def kernel_place(model: Model, block: int, name: str) -> tuple[str, slice]:
    """State-dict key and rows of a kernel: "attn/v" is the last third of qkv."""
    if name == "attn/v":
        return f"blocks.{block}.attn.qkv.weight", slice(2 * model.embed_dim, None)
    return f"blocks.{block}.{name.replace('/', '.')}.weight", slice(None)


def factorize(model: Model) -> Factors:
    """Float64 SVDs of all trainable kernels [out, in]."""
    factors = Factors({}, {}, {})
    for name in trainable_kernels(model):
        places = [kernel_place(model, block, name) for block in range(model.depth)]
        kernels = np.stack([model.state[key][rows] for key, rows in places])
        u, sigma, vh = np.linalg.svd(kernels, full_matrices=False)
        factors.u[name], factors.sigma[name] = u, sigma
        factors.v[name] = vh.swapaxes(1, 2)
    return factors


def zero_epsilon(factors: Factors) -> dict[str, Float64[np.ndarray, "L S"]]:
    """Epsilon (or momentum, or gradient) before the first step."""
    return {name: np.zeros_like(sigma) for name, sigma in factors.sigma.items()}


def merge(model: Model, factors: Factors, eps: Mapping[str, F64]) -> Model:
    """Kernels U diag(sigma + eps) V^T; blocks whose eps is all zero as they were."""
    state = {key: value.copy() for key, value in model.state.items()}
    for block in range(model.depth):
        if not any(eps[name][block].any() for name in eps):
            continue
        for name in trainable_kernels(model):
            key, rows = kernel_place(model, block, name)
            scale = factors.sigma[name][block] + eps[name][block]
            u, v = factors.u[name][block], factors.v[name][block]
            state[key][rows] = u @ np.diag(scale) @ v.T
    return dataclasses.replace(model, state=state)


def epsilon_gradient(
    merged: Model,
    factors: Factors,
    tokens: Sequence[Tokens],
    layer: int,
    dx: Tokens,
) -> dict[str, Float64[np.ndarray, "L S"]]:
    """Pull dx, the gradient of the tokens after block `layer`, back to every epsilon.

    d eps_i = u_i^T dW v_i; `tokens[i]` is the input of block i. Zero after `layer`.
    """
    grads = zero_epsilon(factors)
    for block in range(layer, -1, -1):
        dx, kernel_grads = block_backward(merged, block, tokens[block], dx)
        for name, dw in kernel_grads.items():
            u, v = factors.u[name][block], factors.v[name][block]
            grads[name][block] = np.einsum("os,oi,is->s", u, dw, v, optimize=True)
    return grads


# --- Analysis -------------------------------------------------------------------------


def angles(tokens: F64, direction: Float64[np.ndarray, " D"]) -> F64:
    """Between tokens and a line without sign; radians, 0 to pi / 2."""
    cosine = np.abs(tokens @ direction) / np.linalg.norm(tokens, axis=-1)
    return np.arccos(np.minimum(cosine / np.linalg.norm(direction), 1.0))


def clamp(model: Model, gamma: float) -> Model:
    """W = U min(S, gamma) V^T for every linear layer of the blocks (appendix B)."""
    names = ("fc1", "fc2") if model.ffn_layer == "mlp" else ("w12", "w3")
    state = dict(model.state)
    for block in range(model.depth):
        for name in ("attn.qkv", "attn.proj", *(f"mlp.{each}" for each in names)):
            key = f"blocks.{block}.{name}.weight"
            u, s, vh = np.linalg.svd(state[key], full_matrices=False)
            state[key] = u @ np.diag(np.minimum(s, gamma)) @ vh
    return dataclasses.replace(model, state=state)


class Growth(NamedTuple):
    """Parts of every token's length along a direction."""

    start: Float64[np.ndarray, " T"]
    attention: Float64[np.ndarray, "L T"]
    ffn: Float64[np.ndarray, "L T"]
    end: Float64[np.ndarray, " T"]


def growth(
    model: Model, image: np.ndarray, direction: Float64[np.ndarray, " D"]
) -> Growth:
    """What attention and FFN of each block add to the tokens along a unit vector."""
    x = embed(model, image)
    start, attention, ffn = x @ direction, [], []
    for block in range(model.depth):
        middle = after_attention(model, block, x)
        after = block_forward(model, block, x)
        attention.append((middle - x) @ direction)
        ffn.append((after - middle) @ direction)
        x = after
    return Growth(start, np.stack(attention), np.stack(ffn), x @ direction)


# --- The repair -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """Fields of the library's `RepairOptions`, which may be given in its place."""

    lr: float = 0.005
    momentum: float = 0.9
    mask_thr: float = 4.0
    min_outliers: int = 3
    window: int = 3
    temperature: float = 0.1
    active_blocks: int | None = 10
    reduce: str = "sum"


class ImageResult(NamedTuple):
    """What one image asked for; one line of the log."""

    image: int  # its number, counted from the start of the run
    layer: int  # first defective block, or -1
    loss: float  # nan without defect
    alpha: float
    num_outliers: int
    finite: bool  # False: loss or a gradient was not, and the image changed nothing
    details: NeighborLoss | None
    grads: dict[str, Float64[np.ndarray, "L S"]] | None  # of all blocks up to `layer`

    @property
    def skipped(self) -> bool:
        """Whether the history counts the image as one without defect."""
        return self.layer < 0


class RepairResult(NamedTuple):
    """The log, one entry per image seen, and the state after the last step."""

    log: list[ImageResult]
    eps: dict[str, Float64[np.ndarray, "L S"]]
    momentum: dict[str, Float64[np.ndarray, "L S"]]


def image_result(
    merged: Model,
    factors: Factors,
    image: np.ndarray,
    number: int,
    directions: Float64[np.ndarray, "L D"],
    options: Any,
) -> ImageResult:
    """Search the first block with enough outliers and differentiate its loss."""
    shape = grid_shape(merged, image)
    tokens = [embed(merged, image)]
    for layer in range(merged.depth):
        tokens.append(block_forward(merged, layer, tokens[-1]))
        patches = patch_grid(merged, tokens[-1], shape)
        logits = outlier_logits(patches, directions[layer])
        rule = {"mask_thr": options.mask_thr, "window": options.window}
        if outlier_mask(logits, **rule).sum() < options.min_outliers:
            continue
        rule["temperature"] = options.temperature
        result = neighbor_loss(patches, directions[layer], **rule)
        dx = np.zeros_like(tokens[-1])
        dpatches = neighbor_loss_backward(patches, result)
        dx[1 + merged.num_register_tokens :] = dpatches.reshape(-1, merged.embed_dim)
        grads = epsilon_gradient(merged, factors, tokens, layer, dx)
        finite = all(np.isfinite(x).all() for x in (result.loss, *grads.values()))
        count = int(result.mask.sum())
        return ImageResult(
            number, layer, result.loss, result.alpha, count, finite, result, grads
        )
    return ImageResult(number, -1, np.nan, np.nan, 0, True, None, None)


def active_range(layer: int, options: Any) -> range:
    """The blocks a defect at `layer` updates: the last `active_blocks` up to it."""
    first = 0 if options.active_blocks is None else layer + 1 - options.active_blocks
    return range(max(0, first), layer + 1)


def sgd_update(
    eps: dict[str, F64],
    momentum: dict[str, F64],
    results: Sequence[ImageResult],
    options: Any,
) -> None:
    """PyTorch's SGD, in place: m = mu m + g, eps -= lr m, where some window reaches.

    g is the sum (or the mean) over the images whose window contains the block; eps and
    momentum of a block in no window stay as they are.
    """
    useful = [r for r in results if r.layer >= 0 and r.finite]
    for block in range(len(next(iter(eps.values())))):
        touching = [r for r in useful if block in active_range(r.layer, options)]
        for name in eps if touching else ():
            grad = sum(r.grads[name][block] for r in touching)
            if options.reduce == "mean":
                grad = grad / len(touching)
            momentum[name][block] = options.momentum * momentum[name][block] + grad
            eps[name][block] -= options.lr * momentum[name][block]


def repair_run(
    model: Model,
    images: Sequence[np.ndarray] | np.ndarray,
    directions: np.ndarray,
    options: Any,
    num_steps: int,
    *,
    images_per_step: int = 1,
    history: int = 1_000,
    stop_share: float = 0.75,
) -> RepairResult:
    """The authors' loop over images [3, height, width] and their directions [L, D].

    A step takes `images_per_step` images, number k being number k mod n of the list.
    Ends after `num_steps` steps, or before one that finds `stop_share` of the last
    `history` images without defect; at the start the history is all "had one".
    """
    directions = np.asarray(directions, np.float64)
    factors = factorize(model)
    eps, momentum = zero_epsilon(factors), zero_epsilon(factors)
    log: list[ImageResult] = []
    for step in range(num_steps):
        if sum(entry.skipped for entry in log[-history:]) >= stop_share * history:
            break
        merged = merge(model, factors, eps)
        results = []
        for k in range(step * images_per_step, (step + 1) * images_per_step):
            with np.errstate(all="ignore"):  # `finite` answers for infinities
                image = images[k % len(images)]
                results.append(
                    image_result(merged, factors, image, k, directions, options)
                )
        sgd_update(eps, momentum, results, options)
        log.extend(results)
    return RepairResult(log, eps, momentum)
