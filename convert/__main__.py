"""Command line of the converter; `convert.commands` does the work.

python -m convert NAME ... --> convert/commands/NAME.py --cli.run--> exit code
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sinder_jax import cli, launch

EXAMPLES = """\
examples:
  python -m convert to-jax dinov2_vitl14_pretrain.pth checkpoints/large
  python -m convert to-jax dinov2_vitg14 checkpoints/giant --interpolate-antialias=true
  python -m convert to-jax facebook/dinov2-base checkpoints/base --verify
  python -m convert to-torch checkpoints/giant giant.safetensors
  python -m convert to-torch checkpoints/giant giant_hf --layout=hf --verify
  python -m convert to-torch repaired new.pth --into=depth_anything_v2_vitl.pth
  python -m convert inspect giant.safetensors
  python -m convert diff dinov2_vitg14_pretrain.pth repaired.pth giant.patch.safetensors
  python -m convert diff runs/giant giant.patch.safetensors
  python -m convert apply giant_hf giant.patch.safetensors repaired_hf --scale=0.5
"""
SOURCE = (
    ".pth, .pt or .safetensors file or Hugging Face directory, in the layout of the "
    "DINOv2 hub, transformers or timm"
)


def true_or_false(text: str) -> bool:
    """Parses an option; argparse names this function in its error."""
    return bool(["false", "true"].index(text.lower()))


def numbers(text: str) -> list[float]:
    """Parses numbers with commas between them."""
    return [float(number) for number in text.split(",")]


class Argument(NamedTuple):
    """An argument of a command; its name is the parameter of the command's function."""

    name: str
    metavar: str
    help: str
    type: Callable[[str], Any] = Path
    nargs: str | None = None


VERIFY = (
    "run a photograph through the JAX model and, where PyTorch is installed, through "
    "the PyTorch one, and print the largest difference"
)
TOLD = (
    Argument(
        "--num-heads",
        "N",
        "attention heads (default: what the files say, or DINOv2's for this width)",
        int,
    ),
    Argument(
        "--prefix",
        "TEXT",
        "of the backbone's names in a larger model (default: found by the tensors)",
        str,
    ),
)
# By command: its line in the help, and its arguments but those that all have.
COMMANDS: dict[str, tuple[str, *tuple[Argument, ...]]] = {
    "to-jax": (
        "PyTorch model -> checkpoint directory",
        Argument(
            "src",
            "SRC",
            f"{SOURCE}; or a name to download: dinov2_vit{{s,b,l,g}}14[_reg], or a "
            "Hugging Face id such as facebook/dinov2-giant",
            str,
        ),
        Argument("destination", "DST", "new directory"),
        Argument(
            "--interpolate-antialias",
            "true|false",
            "resample the position embedding with antialiasing (default: as the hub "
            "models do, true with registers, false without; the SINDER authors: true)",
            true_or_false,
        ),
        Argument(
            "--interpolate-offset",
            "X",
            "added to the sides of the resampled grid (default: as in the hub models, "
            "0 with registers, 0.1 without; transformers: 0)",
            float,
        ),
        Argument(
            "--mean",
            "R,G,B",
            "mean of the images that the model was trained on, for pixels in 0 to 1, "
            "where no file says it (default: ImageNet's, as DINOv2)",
            numbers,
        ),
        Argument("--std", "R,G,B", "their standard deviation; both or none", numbers),
    ),
    "to-torch": (
        "checkpoint directory -> PyTorch file or directory",
        Argument(
            "src", "SRC", "checkpoint directory, or a PyTorch model in any layout"
        ),
        Argument(
            "destination", "DST", "new .pth, .pt or .safetensors file; for hf a folder"
        ),
        Argument(
            "--layout", "dinov2|hf|timm", "torch.hub (default), transformers, timm", str
        ),
        Argument(
            "--into",
            "FILE",
            "copy this PyTorch file or directory, with SRC's backbone in place of its "
            "own: heads, decoders, prefixes and number formats are FILE's",
        ),
    ),
    "inspect": (
        "describe a model or a delta and check its integrity",
        Argument("path", "SRC", f"checkpoint directory, {SOURCE}, or a delta"),
    ),
    "diff": (
        "what a repair changed, as a delta under 1 MB",
        Argument(
            "paths",
            "BASE REPAIRED | RUN",
            "two models in any layout, or the workdir of experiments.repair",
            nargs="+",
        ),
        Argument("destination", "DELTA", "new .safetensors file"),
        Argument(
            "--residual",
            "X",
            "how much of a kernel, relative to its norm, may change other than in its "
            "singular values (default: 1e-5, rounding; a repair with float32 SVDs, "
            "such as the authors', may need 1e-3)",
            float,
        ),
    ),
    "apply": (
        "repair a model with a delta, in the model's own layout",
        Argument("base", "BASE", "the model to repair"),
        Argument("delta_path", "DELTA", "file written by diff"),
        Argument(
            "destination", "DST", "new file, or new directory where BASE is a directory"
        ),
        Argument(
            "--scale",
            "X",
            "share of the change to apply, above 0 and at most 1 (default: 1)",
            float,
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; None: the process's own.

    Returns:
      0; 2 after an error, printed as one line on stderr; 130 after Ctrl-C.
    """
    arguments = vars(_parser().parse_args(argv))
    name = arguments.pop("command").replace("-", "_")
    pair = [arguments.pop(x, None) for x in ("mean", "std")]
    if any(pair):
        arguments["statistics"] = pair

    def call() -> None:
        # Imported only now: `--help` need not wait for JAX.
        command = getattr(importlib.import_module(f"convert.commands.{name}"), name)
        launch.start_jax()
        command(**{key: value for key, value in arguments.items() if value is not None})

    return cli.run(call)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m convert",
        description="Convert DINOv2 checkpoints between PyTorch and JAX, exactly.",
        epilog=EXAMPLES,
    )
    parsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    # argparse's own line would show the paths of diff twice.
    usages = {"diff": "%(prog)s [-h] [options] (BASE REPAIRED | RUN) DELTA"}
    for name, (summary, *arguments) in COMMANDS.items():
        sub = parsers.add_parser(name, help=summary, usage=usages.get(name))
        for argument in (*arguments, *TOLD):
            options = argument._asdict()
            sub.add_argument(options.pop("name"), **options)
        if name.startswith("to-"):
            sub.add_argument("--verify", action="store_true", help=VERIFY)
    return parser


if __name__ == "__main__":
    launch.exit_on_error(main)
