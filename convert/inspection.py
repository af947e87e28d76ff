"""`inspect`: what a model or a delta is, where it comes from, whether it is whole."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import layouts, report, source
from convert.files import reading, sha256
from sinder_jax import kernels, linalg, vit
from sinder_jax.model import Model
from sinder_jax.storage import delta_file


def inspect(path: Path, num_heads: int | None = None) -> None:
    """Prints what a model is, where it comes from, and whether its bytes are whole."""
    if _is_delta(path):
        _inspect_delta(path)
        return
    model = source.open_model(path, num_heads)
    tops: dict[str, np.ndarray] = {}
    stated = model.known_digest is not None
    for name, leaf in model.leaves():
        tops |= _largest_singular_values(model.config, name, leaf)
    config = model.config
    heads, antialias = config.num_heads, config.interpolate_antialias
    lines = {
        "architecture": report.title(config),
        "width": f"{config.embed_dim}, {heads} heads of {config.embed_dim // heads}",
        "blocks": f"{config.depth}, FFN {config.ffn_layer}, hidden {config.hidden_dim}",
        "registers": str(config.num_register_tokens),
        "image size": f"{config.img_size} pixels, patches of {config.patch_size}",
        "resampling": f"antialias {antialias}, offset {config.interpolate_offset}",
        "layout": _layout_line(model),
        "number format": ", ".join(model.torch.formats if model.torch else ["float32"]),
        "size": f"{model.num_tensors} tensors, {model.num_params:,} parameters; names, "
        "shapes and finite values checked",
        "digest": model.digest,
        "verified": _verified(model, stated),
        "provenance": report.origin(model.provenance),
    }
    for name, value in lines.items():
        print(f"{name + ':':<15}{value}")
    for step in model.provenance.get("steps", []):
        print(f"{'':<15}then {step}")
    for note in report.notes(model):
        print(f"{'note:':<15}{note}")
    print("largest singular values of the trainable kernels, block by block:")
    in_order = {name: tops[name] for name in kernels.names(config)}
    for line in _columns(in_order, config.depth):
        print(line)


def _largest_singular_values(
    config: vit.ViTConfig, path: str, leaf: np.ndarray
) -> dict[str, np.ndarray]:
    """By kernel name, [L], where the leaf holds a trainable kernel."""
    for name in kernels.names(config):
        place = kernels.place(config, name)
        if path == place.path:
            tops = [linalg.leading_triplets(x, 1).s[0] for x in place.of(leaf)]
            return {name: np.array(tops)}
    return {}


def _columns(tops: Mapping[str, np.ndarray], depth: int) -> Iterator[str]:
    yield "block  " + "".join(f"{name:>12}" for name in tops)
    for block in range(depth):
        yield f"{block:>5}  " + "".join(f"{top[block]:>12.4f}" for top in tops.values())


def _layout_line(model: Model) -> str:
    if model.torch is None:
        return "sinder_jax checkpoint"
    return f"{model.layout}, {layouts.LAYOUTS[model.layout].owner}"


def _verified(model: Model, digest_stated: bool) -> str:
    if model.torch is None:
        return "every array against the SHA-256 stored with it"
    checked = []
    side = sha256.side_file(Path(model.path or ""))
    if side.is_file():
        checked.append(f"the bytes against {side.name}")
    if digest_stated:
        checked.append("the tensors against the digest in the file")
    digest = sha256.of_files(model.torch.files)
    whole = " and ".join(checked) or "against nothing: no .sha256 is beside it"
    return f"{whole}; SHA-256 {digest}"


def _is_delta(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return reading.open_state_dict(path).metadata.get("format") == delta_file.FORMAT


def _inspect_delta(path: Path) -> None:
    repair, metadata = delta_file.load(path)
    lines = {
        "delta for": report.title(repair.config),
        "base digest": repair.base,
        "size": f"{path.stat().st_size:,} bytes",
        "verified": "all of it against the digest in the file; "
        f"SHA-256 {sha256.of_file(path)}",
        "written by": metadata.get("writer", "not known"),
        "base from": report.origin(_json(metadata.get("provenance", "{}"))),
    }
    for name, value in lines.items():
        print(f"{name + ':':<15}{value}")
    for line in report.about_delta(repair):
        print(line)


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
