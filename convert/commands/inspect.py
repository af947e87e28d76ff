"""`inspect`: what a model or a delta is, where it came from, whether it is intact."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert import infer, layouts, opening
from convert.commands import lines
from convert.files import reading, sha256
from sinder_jax import families, kernels, linalg
from sinder_jax.model import Model
from sinder_jax.storage import delta_file


def inspect(path: Path, **told: Any) -> None:
    """Describes a model or a delta and checks that its bytes are as written.

    Args:
      path: a model in any layout, or a delta.
      **told: what the files do not say, as for `convert.open_model`.
    """
    if _is_delta(path):
        _inspect_delta(path)
        return
    model = opening.open_model(path, **told)
    config, stated = model.config, model.known_digest is not None
    places = {name: kernels.place(config, name) for name in kernels.names(config)}
    tops: dict[str, list[float]] = {}
    for leaf_path, leaf in model.leaves():
        for name, place in places.items():
            if place.path == leaf_path:
                stack = place.of(leaf)
                tops[name] = [linalg.leading_triplets(x, 1).s[0] for x in stack]
    width, heads, torch = config.embed_dim, config.num_heads, model.torch
    family = families.of(config)
    antialias, offset = config.interpolate_antialias, config.interpolate_offset
    owner = f", {layouts.LAYOUTS[model.layout].owner}" if torch else " checkpoint"
    fields = {
        "architecture": infer.describe(config),
        "family": f"{config.family}; the shapes are those of "
        f"{' and '.join(infer.same_shapes(config)) or 'no published model known here'}",
        "width": f"{width}, {heads} heads of {width // heads}",
        "heads from": torch.statements["num_heads"].words
        if torch
        else "its own config",
        "blocks": f"{config.depth}, FFN {config.ffn_layer}, hidden {config.hidden_dim}",
        "LayerNorm": f"epsilon {family.norm_epsilon:g}",
        "pixels": f"mean {_numbers(family.statistics.mean)}, standard deviation "
        f"{_numbers(family.statistics.std)}",
        "registers": str(config.num_register_tokens),
        "image size": f"{config.img_size} pixels, patches of {config.patch_size}",
        "resampling": f"antialias {antialias}, offset {offset}",
        "not told": "; ".join(lines.untold(model)) or "nothing",
        "layout": model.layout + owner,
        "number format": ", ".join(torch.formats if torch else ["float32"]),
        "size": f"{model.num_tensors} tensors, {model.num_params:,} parameters; names, "
        "shapes and finite values checked",
        "digest": model.digest,
        "verified": _verified(model, stated),
        "provenance": lines.origin(model.provenance),
    }
    _print_columns(fields.items())
    _print_columns(("", f"then {step}") for step in model.provenance.get("steps", []))
    notes = (*lines.unusual(config), *lines.notes(model))
    _print_columns(("note", note) for note in notes)
    print("largest singular values of the trainable kernels, block by block:")
    print("block  " + "".join(f"{name:>12}" for name in places))
    for block in range(config.depth):
        row = (f"{tops[name][block]:>12.4f}" for name in places)
        print(f"{block:>5}  " + "".join(row))


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _print_columns(fields: Iterable[tuple[str, str]]) -> None:
    for name, value in fields:
        print(f"{name + ':' if name else '':<15}{value}")


def _verified(model: Model, digest_stated: bool) -> str:
    if model.torch is None:
        return "every array against the SHA-256 stored with it"
    checked = []
    side = sha256.side_file(Path(model.path or ""))
    if side.is_file():
        checked.append(f"the bytes against {side.name}")
    if digest_stated:
        checked.append("the tensors against the digest in the file")
    done = " and ".join(checked) or "against nothing: no .sha256 is beside it"
    return f"{done}; SHA-256 {sha256.of_files(model.torch.files)}"


def _is_delta(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return reading.open_state_dict(path).metadata.get("format") == delta_file.FORMAT


def _inspect_delta(path: Path) -> None:
    repair, metadata = delta_file.load(path)
    fields = {
        "delta for": infer.describe(repair.config),
        "base digest": repair.base,
        "size": f"{path.stat().st_size:,} bytes",
        "verified": "all of it against the digest in the file; SHA-256 "
        f"{sha256.of_file(path)}",
        "written by": metadata["writer"],
        "base from": lines.origin(metadata["provenance"]),
    }
    _print_columns(fields.items())
    print(lines.about_delta(repair))
