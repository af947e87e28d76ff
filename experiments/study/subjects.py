"""What is analyzed: models whose weights are read when needed, photographs, options.

path --Subject--> architecture, digest, provenance, weights
images --read_photos--> [Photo, ...]: resized to whole patches, each with a name
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import convert
from experiments.visualize import ARCHITECTURE
from sinder_jax import param_tree
from sinder_jax.data import decode
from sinder_jax.storage import paths


@dataclasses.dataclass(frozen=True)
class Options:
    """What the numbers depend on besides model and photographs.

    Attributes:
      mask_thr, window, min_outliers: of the detection, see `repair.RepairOptions`.
      image_size: short side of a photograph in pixels.
      method, num_probes, seed: of the directions, see `defects.singular_defects`; the
        seed also draws the random directions.
      gammas: thresholds of the clamped models.
      blocks: those shown one by one; None: four, at even distances, the last among
        them (9, 19, 29 and 39 of a giant).
    """

    mask_thr: float = 4.0
    window: int = 3
    min_outliers: int = 3
    image_size: int = 518
    method: str = "analytic"
    num_probes: int = 100_000
    seed: int = 0
    gammas: tuple[float, ...] = (2.0, 1.5, 1.3)
    blocks: tuple[int, ...] | None = None


class Photo(NamedTuple):
    """A photograph as the models see it.

    Attributes:
      name: of its figures; no two are the same.
      path: of the file.
      pixels: RGB, whole patches.
      digest: of the file's bytes.
    """

    name: str
    path: Path
    pixels: np.ndarray
    digest: str


class Subject:
    """A model that is studied; its weights are read when they are first needed.

    Args:
      name: what the figures call it.
      path: a checkpoint of ours or PyTorch files, see `convert.open_model`.
      antialias: replaces the model's own `interpolate_antialias`; None: leaves it.

    Raises:
      As `convert.open_model`.
    """

    def __init__(self, name: str, path: str, antialias: bool | None = None):
        self.name, self.path = name, path
        where = paths.as_path(path)
        if not where.exists():
            raise FileNotFoundError(f"no such checkpoint: {path}")
        self.model = convert.open_model(where)
        self.config = self.model.config
        if antialias is not None:
            self.config = dataclasses.replace(
                self.config, interpolate_antialias=antialias
            )

    @functools.cached_property
    def digest(self) -> str:
        """Of the weights, see `sinder_jax.digest`."""
        if self.model.digest is not None:
            return self.model.digest
        return param_tree.digest(param_tree.flatten(self.params))

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """On the host."""
        return param_tree.unflatten(dict(self.model.leaves()))

    @functools.cached_property
    def placed(self) -> Any:
        """On the device."""
        return jax.device_put(self.params)

    def forget(self) -> None:
        """Drops the weights until they are needed again."""
        for name in ("params", "placed"):
            self.__dict__.pop(name, None)


def check_same_architecture(first: Subject, second: Subject) -> None:
    """Raises ValueError that says in what two models differ."""
    differences = [
        f"{name} is {getattr(first.config, name)} and {getattr(second.config, name)}"
        for name in ARCHITECTURE
        if getattr(first.config, name) != getattr(second.config, name)
    ]
    if differences:
        raise ValueError(
            f"{first.path} and {second.path} are of different architectures: "
            f"{', '.join(differences)}"
        )


def read_photos(
    files: Sequence[Path],
    image_size: int,
    patch_size: int,
    skipped: Callable[[str], None],
) -> list[Photo]:
    """The photographs of files, resized as `data.visual_resize` does.

    Args:
      files: of images.
      image_size: short side in pixels, a multiple of `patch_size`.
      patch_size: pixels per patch side.
      skipped: told of each file that cannot be read.

    Raises:
      ValueError: not one of them can be read, or the size is not of whole patches.
    """
    decode.check_side("the image size", image_size, patch_size)
    photos: dict[str, Photo] = {}
    for file in files:
        try:
            content = file.read_bytes()
            image = decode.read_rgb(content, name=str(file))
        except (OSError, decode.UnreadableImage) as error:
            skipped(str(error))
            continue
        pixels = decode.visual_resize(image, image_size, patch_size=patch_size)
        tails = (f"-{i}" if i > 1 else "" for i in itertools.count(1))
        names = (f"{file.stem}{tail}" for tail in tails)
        # Without case, for some file systems take A.png and a.png for one file.
        name = next(name for name in names if name.lower() not in photos)
        sha256 = hashlib.sha256(content).hexdigest()
        photos[name.lower()] = Photo(name, file, np.asarray(pixels), sha256)
    if files and not photos:
        raise ValueError(f"none of {len(files)} images can be read, such as {files[0]}")
    return list(photos.values())
