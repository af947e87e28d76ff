"""Photographs and datasets of them, made on the spot: shared by the tests."""

import io
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image

from sinder_jax import families
from sinder_jax.data import decode

FAMILY = families.named("dinov2")


def save_noise(path: Path, width: int = 40, height: int = 30, seed: int = 0, **options):
    """Writes a picture of noise and gives back its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square as DINOv2 sees it."""
    return decode.training_crop(image, size, patch_size=FAMILY.patch_size)


def normalize(image) -> np.ndarray:
    """Pixels as numbers for DINOv2."""
    return decode.normalize(image, FAMILY.statistics)


def prepared(file, size: int) -> np.ndarray:
    """A file's middle square as numbers for DINOv2."""
    return normalize(crop(decode.read_rgb(file), size))


def write_dataset(
    folder: Path,
    splits: dict[str, list[Path]],
    file_format: str = "array_record",
    feature: str = "image",
) -> Path:
    """Prepares the TFDS dataset `tiny_photos` from files; gives the version's folder.

    The records are in the order of the files: nothing shuffles them.
    """
    import tensorflow_datasets as tfds

    class TinyPhotos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(folder)  # where it looks for a description

        def _info(self):
            features = {
                feature: tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "file": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(x) for name, x in splits.items()}

        def _generate_examples(self, files):
            for i, file in enumerate(files):
                content = io.BytesIO(file.read_bytes())
                yield i, {feature: content, "label": i % 2, "file": file.name}

    folder.mkdir(exist_ok=True)
    tfds.disable_progress_bar()
    builder = TinyPhotos(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_dir)
