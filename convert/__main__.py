"""Command line of the converter: `to-jax`, `to-torch`, `inspect`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = """\
examples:
  python -m convert to-jax dinov2_vitl14_pretrain.pth checkpoints/large
  python -m convert to-jax dinov2_vitg14_pretrain.pth checkpoints/giant \\
      --interpolate-antialias=true
  python -m convert to-torch checkpoints/giant giant.safetensors
  python -m convert inspect giant.safetensors
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and ends with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; None: those of the process.

    Returns:
      0, or 2 after an error, of which one line stands on stderr.
    """
    options = _parser().parse_args(argv)
    try:
        options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m convert",
        description="Convert DINOv2 checkpoints between PyTorch and JAX, exactly.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    files = ".pth, .pt or .safetensors, names as in the DINOv2 hub files"

    to_jax = commands.add_parser("to-jax", help="PyTorch file -> checkpoint directory")
    to_jax.add_argument("source", metavar="SRC", type=Path, help=files)
    to_jax.add_argument("destination", metavar="DST", type=Path, help="new directory")
    _add_num_heads(to_jax)
    to_jax.add_argument(
        "--interpolate-antialias",
        type=_boolean,
        metavar="true|false",
        help="resample the position embedding with antialiasing (default: as the hub "
        "models, true with registers and else false; the SINDER authors: true)",
    )
    to_jax.add_argument(
        "--interpolate-offset",
        type=float,
        metavar="X",
        help="added to the sides of its new grid (default: as the hub models, 0 with "
        "registers and else 0.1)",
    )
    to_jax.set_defaults(command=_to_jax)

    to_torch = commands.add_parser(
        "to-torch", help="checkpoint directory -> PyTorch file"
    )
    to_torch.add_argument("source", metavar="SRC", type=Path, help="directory")
    to_torch.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="new .pth, .pt or .safetensors file",
    )
    to_torch.add_argument("--layout", default="dinov2", help="names to write: dinov2")
    to_torch.set_defaults(command=_to_torch)

    inspect = commands.add_parser("inspect", help="say what a file or directory holds")
    inspect.add_argument(
        "source", metavar="SRC", type=Path, help=f"directory, or {files}"
    )
    _add_num_heads(inspect)
    inspect.set_defaults(command=_inspect)
    return parser


def _add_num_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="attention heads (default: width / 64)",
    )


def _boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


# --- Commands: JAX is imported here, so that --help need not wait for it ----------


def _to_jax(options: argparse.Namespace) -> None:
    from sinder_jax import checkpoint

    checkpoint.check_destination(options.destination)
    given = {
        "interpolate_antialias": options.interpolate_antialias,
        "interpolate_offset": options.interpolate_offset,
    }
    overrides = {name: value for name, value in given.items() if value is not None}
    config, params, state_dict = _read_torch(options, overrides)
    converted = [name for name in _formats(state_dict) if name != "float32"]
    size = _size(state_dict)
    del state_dict  # the params are a copy
    checkpoint.save(options.destination, config, params)
    note = f"; {' and '.join(converted)} became float32" if converted else ""
    print(f"{options.destination}: {_title(config)}, {size}{note}.")


def _to_torch(options: argparse.Namespace) -> None:
    from convert import io, names
    from sinder_jax import checkpoint

    names.check_layout_name(options.layout)
    io.check_destination(options.destination)
    config, params = checkpoint.load(options.source)
    state_dict = names.to_torch(config, params, layout=options.layout)
    io.write_state_dict(options.destination, state_dict)
    size = _size(state_dict)
    print(f"{options.destination}: {_title(config)}, {options.layout} layout, {size}.")


def _inspect(options: argparse.Namespace) -> None:
    from sinder_jax import checkpoint

    if options.source.is_dir():
        config, params = checkpoint.load(options.source)
        layout, arrays = "sinder_jax checkpoint", checkpoint.flatten(params)
        if options.num_heads not in (None, config.num_heads):
            raise ValueError(f"{options.source}: has {config.num_heads} heads.")
    else:
        config, _, arrays = _read_torch(options, {})
        layout = "dinov2 (hub)"
    heads, antialias = config.num_heads, config.interpolate_antialias
    lines = {
        "architecture": _title(config),
        "width": f"{config.embed_dim}, {heads} heads of {config.embed_dim // heads}",
        "blocks": f"{config.depth}, FFN {config.ffn_layer}, hidden {config.hidden_dim}",
        "registers": config.num_register_tokens,
        "image size": f"{config.img_size} pixels, patches of {config.patch_size}",
        "resampling": f"antialias {antialias}, offset {config.interpolate_offset}",
        "layout": layout,
        "number format": ", ".join(_formats(arrays)),
        "size": _size(arrays),
    }
    for name, value in lines.items():
        print(f"{name + ':':<15}{value}")


def _read_torch(
    options: argparse.Namespace, overrides: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from convert import io, names

    state_dict = io.read_state_dict(options.source)
    try:
        config, params = names.from_torch(state_dict, options.num_heads, **overrides)
    except ValueError as error:
        raise ValueError(f"{options.source}: {error}") from None
    return config, params, state_dict


def _title(config: Any) -> str:
    from convert import names

    return names.hub_name(config) or "a DINOv2 model of its own size"


def _formats(arrays: Mapping[str, Any]) -> list[str]:
    return sorted({array.dtype.name for array in arrays.values()})


def _size(arrays: Mapping[str, Any]) -> str:
    parameters = sum(array.size for array in arrays.values())
    return (
        f"{len(arrays)} tensors, {parameters:,} parameters; names, shapes and finite "
        "values checked"
    )


if __name__ == "__main__":
    sys.exit(main())
