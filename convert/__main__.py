"""Command line of the converter: `commands`, `inspection`, `patches` do the work."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = """\
examples:
  python -m convert to-jax dinov2_vitl14_pretrain.pth checkpoints/large
  python -m convert to-jax dinov2_vitg14 checkpoints/giant --interpolate-antialias=true
  python -m convert to-jax facebook/dinov2-base checkpoints/base --verify
  python -m convert to-torch checkpoints/giant giant.safetensors
  python -m convert to-torch checkpoints/giant giant_hf --layout=hf --verify
  python -m convert inspect giant.safetensors
  python -m convert diff dinov2_vitg14_pretrain.pth repaired.pth giant.patch.safetensors
  python -m convert diff runs/giant giant.patch.safetensors
  python -m convert apply giant_hf giant.patch.safetensors repaired_hf --scale=0.5
"""
SOURCE = (
    ".pth, .pt or .safetensors file or Hugging Face directory, in the layout of the "
    "DINOv2 hub, transformers or timm"
)


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
      0; 2 after an error, of which one line stands on stderr; 130 after Ctrl-C.
    """
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        command(**{name: x for name, x in arguments.items() if x is not None})
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m convert",
        description="Convert DINOv2 checkpoints between PyTorch and JAX, exactly.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_to_jax(commands)
    _add_to_torch(commands)
    _add_inspect(commands)
    _add_diff(commands)
    _add_apply(commands)
    return parser


def _add_to_jax(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("to-jax", help="PyTorch model -> checkpoint directory")
    parser.add_argument(
        "src",
        metavar="SRC",
        help=f"{SOURCE}; or a name to fetch: dinov2_vit{{s,b,l,g}}14[_reg], or an id "
        "of Hugging Face such as facebook/dinov2-giant",
    )
    parser.add_argument("destination", metavar="DST", type=Path, help="new directory")
    _add_num_heads(parser)
    parser.add_argument(
        "--interpolate-antialias",
        type=_boolean,
        metavar="true|false",
        help="resample the position embedding with antialiasing (default: as the hub "
        "models, true with registers and else false; the SINDER authors: true)",
    )
    parser.add_argument(
        "--interpolate-offset",
        type=float,
        metavar="X",
        help="added to the sides of its new grid (default: as the hub models, 0 with "
        "registers and else 0.1; transformers: 0)",
    )
    _add_verify(parser)
    parser.set_defaults(command=_to_jax)


def _add_to_torch(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "to-torch", help="checkpoint directory -> PyTorch file or directory"
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        type=Path,
        help="checkpoint directory, or a PyTorch model to bring into another layout",
    )
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="new .pth, .pt or .safetensors file; for hf a new directory",
    )
    parser.add_argument(
        "--layout",
        default="dinov2",
        metavar="dinov2|hf|timm",
        help="for torch.hub (default), transformers or timm",
    )
    _add_num_heads(parser)
    _add_verify(parser)
    parser.set_defaults(command=_to_torch)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect", help="say what a model or a patch is, and whether it is whole"
    )
    parser.add_argument(
        "path",
        metavar="SRC",
        type=Path,
        help=f"checkpoint directory, {SOURCE}, or a patch",
    )
    _add_num_heads(parser)
    parser.set_defaults(command=_inspect)


def _add_diff(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "diff",
        help="what a repair changed, as a patch under 1 MB",
        usage="%(prog)s [-h] [--num-heads N] (BASE REPAIRED | RUN) PATCH",
    )
    parser.add_argument(
        "paths",
        metavar="BASE REPAIRED | RUN",
        nargs="+",
        type=Path,
        help="two models in any layout, or the workdir of experiments.repair",
    )
    parser.add_argument(
        "destination", metavar="PATCH", type=Path, help="new .safetensors file"
    )
    parser.add_argument(
        "--residual",
        type=float,
        metavar="X",
        help="how much of a kernel may differ otherwise than in its singular values, "
        "relative to its norm (default: 1e-5, rounding; a repair that used a float32 "
        "SVD, as the authors' does, may need 1e-3)",
    )
    _add_num_heads(parser)
    parser.set_defaults(command=_diff)


def _add_apply(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "apply", help="repair a model by a patch, in the model's own layout"
    )
    parser.add_argument("base", metavar="BASE", type=Path, help="the unrepaired model")
    parser.add_argument("patch_path", metavar="PATCH", type=Path, help="from diff")
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="new file, or new directory where BASE is one",
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="apply this part of the change, above 0 to 1 (default: 1)",
    )
    _add_num_heads(parser)
    parser.set_defaults(command=_apply)


def _add_num_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="attention heads (default: what the files say, or width / 64)",
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run a photograph through the JAX model and, where PyTorch is installed, "
        "through the PyTorch one, and print the largest difference",
    )


def _boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


# --- Commands: JAX is imported here, so that --help need not wait for it ----------


def _to_jax(**arguments: Any) -> None:
    from convert import commands

    commands.to_jax(**arguments)


def _to_torch(**arguments: Any) -> None:
    from convert import commands

    commands.to_torch(**arguments)


def _inspect(**arguments: Any) -> None:
    from convert import inspection

    inspection.inspect(**arguments)


def _diff(**arguments: Any) -> None:
    from convert import patches

    patches.diff(**arguments)


def _apply(**arguments: Any) -> None:
    from convert import patches

    patches.apply(**arguments)


if __name__ == "__main__":
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            # A name that no encoding covers is shown escaped, not made an error.
            output.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.exit(main())
