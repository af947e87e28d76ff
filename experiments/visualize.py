"""Pictures of what a model makes of photographs: PCA, token norms, outliers.

    photograph --visual_resize--> model --tokens of the last block--> OUT/<name>.png

With --compare, the same of a second checkpoint in a row below. Outliers of both are
those along the first one's direction, so that one yardstick serves before and after.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sinder_jax import cli

if TYPE_CHECKING:  # JAX takes seconds to import, which --help need not wait for
    from sinder_jax import vit
    from sinder_jax.analysis import defective

    Model = tuple[vit.ViTConfig, dict[str, Any]]  # as `checkpoint.load` returns it

EXAMPLE = """\
example:
  python -m experiments.visualize photos/ villa.png --checkpoint=vitg14 \\
      --compare=run/repaired --out=pictures

prints for each image how many patch tokens of the last block are outliers along its
singular defect direction, and the largest token norm over the median one.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""

# What two checkpoints must have in common. The stored grid and how it is resampled
# belong to a model: each runs by its own.
ARCHITECTURE = (
    "embed_dim",
    "depth",
    "num_heads",
    "ffn_layer",
    "patch_size",
    "num_register_tokens",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one picture per image.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code: 0, or 2 if not one image could be read.

    Raises:
      ValueError, OSError, FloatingPointError: what `cli.exit_on_error` shows the user.
    """
    args = _parser().parse_args(argv)

    from sinder_jax import families, loss
    from sinder_jax.data import decode
    from sinder_jax.plots import pictures, style
    from sinder_jax.storage import files as stored

    # First whatever can be told to be wrong before the long part begins.
    loss.check_loss_options(mask_thr=args.mask_thr, window=3, temperature=1.0)
    files = collect(args.images)
    targets = name_targets(files, Path(args.out), overwrite=args.overwrite)
    models = load_models([args.checkpoint, *([args.compare] if args.compare else [])])
    config = models[0][0]
    family, patch_size = families.of(config), config.patch_size
    short_side = args.short_side or family.image_size
    decode.check_side("--short-side", short_side, patch_size)
    Path(args.out).mkdir(parents=True, exist_ok=True)

    observe = observer(models, mask_thr=args.mask_thr)
    names = ["before", "now"] if args.compare else ["model"]
    written = 0
    for file, target in zip(files, targets, strict=True):
        try:
            image = decode.read_rgb(file)
        except decode.UnreadableImage as error:
            print(f"skipped, unreadable: {error}", file=sys.stderr, flush=True)
            continue
        image = decode.visual_resize(image, short_side, patch_size=patch_size)
        try:
            rows = dict(
                zip(
                    names,
                    observe(decode.normalize(image, family.statistics)),
                    strict=True,
                )
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{file}: {error}") from None
        figure = pictures.token_rows([(np.asarray(image), rows)])
        stored.write(target, style.encode(figure, "png"))
        print(f"{file}: {summary(rows)}: {target}", flush=True)
        written += 1

    unreadable = len(files) - written
    skipped = f", {unreadable} unreadable and skipped" if unreadable else ""
    print(f"{written} of {len(files)} pictures written to {args.out}{skipped}")
    return 0 if written else 2


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.visualize",
        description="Draw the tokens of a model: PCA, norms and outliers.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="file, or folder to search")
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="model, as written by `python -m convert to-jax`",
    )
    add("--compare", metavar="DIR", help="second model, such as the repaired one")
    add("--out", default="pictures", metavar="DIR", help="default: %(default)s")
    add(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="of the image the model sees, a multiple of its patch size; default: "
        "the size that models of its family are made for",
    )
    add(
        "--mask-thr",
        type=float,
        default=4.0,
        metavar="X",
        help="an outlier's |cos| is X standard deviations above the image's mean; "
        "default: %(default)s",
    )
    add("--overwrite", action="store_true", help="replace pictures that exist")
    return parser


def collect(images: Sequence[str]) -> list[Path]:
    """Expands folders into the images below them; each path once, in the order given.

    Raises:
      FileNotFoundError: something given does not exist.
      ValueError: a folder holds no image.
    """
    from sinder_jax.data import listing

    files: list[Path] = []
    for image in images:
        path = Path(image)
        if not path.exists():
            raise FileNotFoundError(f"no such image or folder: {image}")
        files += listing.list_images(path) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def name_targets(files: Sequence[Path], out: Path, *, overwrite: bool) -> list[Path]:
    """Gives every image a picture name of its own: villa.png, villa-2.png, and so on.

    Raises:
      FileExistsError: one of them is there already, and `overwrite` is False.
    """
    targets: dict[str, Path] = {}
    for file in files:
        tails = (f"-{i}" if i > 1 else "" for i in itertools.count(1))
        names = (f"{file.stem}{tail}.png" for tail in tails)
        # Without case, for some file systems take A.png and a.png for one file.
        name = next(name for name in names if name.lower() not in targets)
        targets[name.lower()] = out / name
    there = [target for target in targets.values() if target.exists()]
    if there and not overwrite:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise FileExistsError(
            f"{there[0]}{more} exists: add --overwrite or choose another --out"
        )
    return list(targets.values())


def load_models(paths: Sequence[str]) -> "list[Model]":
    """Loads checkpoints that must be of one architecture.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is no checkpoint, or two architectures differ; says in what.
    """
    from sinder_jax import checkpoint

    models = [checkpoint.load(path) for path in paths]
    first = models[0][0]
    for path, (config, _) in zip(paths, models, strict=True):
        differences = [
            f"{name} is {getattr(first, name)} and {getattr(config, name)}"
            for name in ARCHITECTURE
            if getattr(first, name) != getattr(config, name)
        ]
        if differences:
            raise ValueError(
                f"{paths[0]} and {path} are of different architectures: "
                f"{', '.join(differences)}"
            )
    return models


def observer(
    models: "Sequence[Model]", *, mask_thr: float
) -> "Callable[[np.ndarray], list[defective.TokenMaps]]":
    """Prepares a look at the tokens that leave the last block of each model.

    Args:
      models: of one architecture; the direction is the first one's, of its last block.
      mask_thr: see `loss.outlier_mask`.

    Returns:
      A function from a normalized image [height, width, 3] to the `TokenMaps` of each
      model; see `defective.token_maps` for what it raises.
    """
    import jax

    from sinder_jax import defects
    from sinder_jax.analysis import defective, tokens

    direction = defects.singular_defect_directions(*models[0])[-1]
    placed = [(config, jax.device_put(params)) for config, params in models]

    def observe_image(image):
        return [
            defective.token_maps(
                tokens.last_patches(config, params, image),
                direction,
                mask_thr=mask_thr,
            )
            for config, params in placed
        ]

    return observe_image


def summary(rows: "dict[str, defective.TokenMaps]") -> str:
    """Says in one line how many outliers and how large norms each model has."""
    from sinder_jax.analysis import defective

    return " -> ".join(defective.describe(maps) for maps in rows.values())


if __name__ == "__main__":
    cli.exit_on_error(main)
