"""Pictures of what a model makes of photographs: PCA, token norms, outliers.

    photograph --visual_resize--> model --tokens of the last block--> OUT/<name>.png

With --compare, a second model gets a row below. Both models' outliers are those along
the first model's direction: one yardstick for before and after.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import config as config_files
from sinder_jax import cli, launch

if TYPE_CHECKING:  # JAX takes seconds to import, which --help need not wait for
    from sinder_jax.analysis.defective import TokenMaps
    from sinder_jax.model import Model
    from sinder_jax.vit import ViTConfig

EXAMPLE = """\
example:
  python -m experiments.visualize photos/ villa.png --checkpoint=vitg14 \\
      --compare=run/repaired --out=pictures

prints for each image how many patch tokens of the last block are outliers along its
singular defect direction, and the largest token norm over the median norm.
SINDER_TRACEBACK=1 in the environment shows where an error comes from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one picture per image.

    Args:
      argv: the command line without the program's name; None means the process's own.

    Returns:
      The exit code: 0, or 2 if no image could be read.

    Raises:
      ValueError, OSError, FloatingPointError: for `launch.exit_on_error` to show.
    """
    args = _parser().parse_args(argv)

    import convert
    from convert.commands import lines
    from experiments.study import photos
    from sinder_jax import loss, model
    from sinder_jax.analysis import defective
    from sinder_jax.data import decode
    from sinder_jax.plots import pictures, style
    from sinder_jax.storage import files

    launch.start_jax()
    # First everything that can be checked before the long part begins.
    loss.check_loss_options(mask_thr=args.mask_thr)
    images, out = photos.collect(args.images), Path(args.out)
    check_targets(out, photos.unique_names(images), overwrite=args.overwrite)
    paths = [args.checkpoint, *([args.compare] if args.compare else [])]
    models = [convert.open_model(path) for path in paths]
    for note in lines.untold_statistics(models[0]):
        cli.warn(f"{args.checkpoint}: {note}")
    model.check_same_architecture(models[0], models[-1])
    config = models[0].config
    short_side = args.short_side or config.img_size
    decode.check_side("--short-side", short_side, config.patch_size)
    out.mkdir(parents=True, exist_ok=True)

    maps_of = observer(models, mask_thr=args.mask_thr)
    names = ["before", "now"] if args.compare else ["model"]
    written = 0
    for photo in photos.read_photos(images, short_side, config.patch_size):
        try:
            rows = dict(zip(names, maps_of(photo.pixels), strict=True))
        except FloatingPointError as error:
            raise FloatingPointError(f"{photo.path}: {error}") from None
        target = out / f"{photo.name}.png"
        figure = pictures.token_rows([(photo.pixels, rows)])
        files.write(target, style.encode(figure, "png"))
        summary = " -> ".join(defective.describe(maps) for maps in rows.values())
        print(cli.shown(f"{photo.path}: {summary}: {target}"), flush=True)
        written += 1

    unreadable = len(images) - written
    skipped = f", {unreadable} unreadable and skipped" if unreadable else ""
    print(cli.shown(f"{written} of {len(images)} pictures written to {out}{skipped}"))
    return 0 if written else 2


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.visualize",
        description="Draw the tokens of a model: PCA, norms and outliers.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="file, or folder to search; turned upright as its EXIF rotation says",
    )
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="model: a checkpoint, the workdir of a run, or a PyTorch file",
    )
    add("--compare", metavar="DIR", help="second model, such as the repaired one")
    add("--out", default="pictures", metavar="DIR", help="default: %(default)s")
    add(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="short side of the image that the model sees, a multiple of its patch "
        "size; default: that of the images the model was made for",
    )
    add(
        "--mask-thr",
        type=float,
        default=config_files.load("giant.py").mask_thr,
        metavar="X",
        help="an outlier's |cos| is X standard deviations above the image's mean; "
        "default: %(default)s",
    )
    add("--overwrite", action="store_true", help="replace pictures that exist")
    return parser


def check_targets(out: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raises FileExistsError if a picture exists, unless `overwrite` is True."""
    there = [path for name in names if (path := out / f"{name}.png").exists()]
    if there and not overwrite:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise FileExistsError(
            f"{there[0]}{more} exists: add --overwrite or choose another --out"
        )


def observer(
    models: "Sequence[Model]", *, mask_thr: float
) -> "Callable[[np.ndarray], list[TokenMaps]]":
    """Prepares to map the tokens after the last block of each model.

    Args:
      models: of one architecture; the direction is the first model's, of its last
        block.
      mask_thr: see `loss.outlier_mask`.

    Returns:
      A function from RGB pixels [height, width, 3] to the `TokenMaps` of each model,
      which normalizes them by its own statistics; see `defective.token_maps` for its
      errors.
    """
    import jax

    from sinder_jax import defects, families
    from sinder_jax.analysis import defective, tokens
    from sinder_jax.data import decode

    first = models[0]
    direction = defects.singular_defect_directions(first.config, first.params)[-1]
    placed = [(each.config, jax.device_put(each.params)) for each in models]

    def maps(config: "ViTConfig", params: Any, pixels: np.ndarray) -> "TokenMaps":
        image = decode.normalize(pixels, families.of(config).statistics)
        patches = tokens.last_patches(config, params, image)
        return defective.token_maps(patches, direction, mask_thr=mask_thr)

    def maps_of(pixels: np.ndarray) -> "list[TokenMaps]":
        return [maps(*each, pixels) for each in placed]

    return maps_of


if __name__ == "__main__":
    launch.exit_on_error(main)
