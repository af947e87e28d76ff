"""Reads the recorded numbers of `golden/` and translates their names into ours.

    golden/NAME.npz, .json -> load(NAME) -> (arrays, meta) -> state, options, stacked

`golden/README.md` says where the numbers come from and what every key means.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
REPAIRED = ("swiglu", "gelu", "moving")  # with directions and a whole repair run
FORWARD = ("registers", "offset_no_antialias", "native")  # forward pass only
NAMES = REPAIRED + FORWARD


@functools.cache
def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One recording: arrays by key (read-only, float32 unless said) and the json."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    for array in arrays.values():
        array.flags.writeable = False  # the cache hands the same arrays to every test
    return arrays, json.loads((FOLDER / f"{name}.json").read_text())


def state(arrays: Mapping[str, np.ndarray], prefix: str = "state") -> dict[str, Any]:
    """The PyTorch-named state dict recorded under `state/` or `merged/`."""
    start = prefix + "/"
    return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


def architecture(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The model's fields under our names ("swiglufused" is our "swiglu")."""
    names = ("embed_dim", "depth", "num_heads", "img_size", "patch_size")
    names += ("num_register_tokens", "interpolate_antialias", "interpolate_offset")
    ffn_layer = {"mlp": "mlp", "swiglufused": "swiglu"}[meta["ffn_layer"]]
    return {name: meta[name] for name in names} | {"ffn_layer": ffn_layer}


def options(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The repair's options under our names; the authors' limit 0 is our None."""
    return {
        "lr": meta["lr"],
        "momentum": meta["momentum"],
        "mask_thr": meta["mask_thr"],
        "min_outliers": meta["skip_less_than"],
        "window": meta["kernel"],
        "active_blocks": meta["limit_layers"] or None,
    }


def epsilon_name(block: int, kernel: str) -> str:
    """The authors' name: (3, "attn/v") -> "blocks.3.attn.qkv.epsilon_v"."""
    if kernel == "attn/v":
        return f"blocks.{block}.attn.qkv.epsilon_v"
    return f"blocks.{block}.{kernel.replace('/', '.')}.epsilon"


def sigma_name(block: int, kernel: str) -> str:
    """The key of a kernel's recorded singular values: "sv/blocks.3.attn.qkv.v"."""
    module = "attn.qkv.v" if kernel == "attn/v" else kernel.replace("/", ".")
    return f"sv/blocks.{block}.{module}"


def kernels(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Our names of a block's trainable kernels, in the order they are applied."""
    ffn = ("fc1", "fc2") if meta["ffn_layer"] == "mlp" else ("w12", "w3")
    return ("attn/v", "attn/proj", *(f"mlp/{name}" for name in ffn))


def stacked(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], prefix: str
) -> dict[str, np.ndarray]:
    """Recorded epsilon-shaped numbers as `{kernel: [L, S]}`; absent blocks are zero.

    Args:
        arrays: What `load` returned.
        meta: What `load` returned.
        prefix: "final_epsilon", or "stepK/grad_full" (blocks after the defect, which
            received no gradient, are absent there).
    """
    result = {}
    for kernel in kernels(meta):
        keys = [f"{prefix}/{epsilon_name(i, kernel)}" for i in range(meta["depth"])]
        zero = np.zeros_like(arrays[keys[0]])
        result[kernel] = np.stack([arrays.get(key, zero) for key in keys])
    return result


def detailed_steps(arrays: Mapping[str, np.ndarray]) -> list[int]:
    """The steps whose mask, target and gradients were recorded."""
    return sorted(int(k[4 : k.index("/")]) for k in arrays if k.endswith("/mask"))


@functools.cache
def patches(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Patch tokens [H, W, D] of the defect's block, and the block's direction."""
    arrays, meta = load(name)
    block, shape = meta["log"][0]["layer"], arrays["step0/mask"].shape
    tokens = arrays[f"tokens/block_{block}"][0, 1 + meta["num_register_tokens"] :]
    return tokens.reshape(*shape, -1), arrays["singular_defects"][block]
