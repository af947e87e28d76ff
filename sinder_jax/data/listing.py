"""Where photographs are: a folder, a list of files, a TFDS dataset, the sample.

    "folder:/data/train" --open_photographs--> [Photograph, ...]    nothing decoded yet
    Photograph --read--> RGB                                        or UnreadableImage

The order does not depend on the file system. A `Photograph` is small and can be sent to
another process, which opens the file or dataset itself. File names are bytes: those
that are not UTF-8 are text with surrogates (PEP 383), here and in all that is written.
"""

import codecs
import dataclasses
import functools
import importlib.util
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from PIL import Image

from sinder_jax.data import decode
from sinder_jax.data.decode import SUFFIXES
from sinder_jax.storage import paths

SAMPLE = "sample"
CROPS = "sample:crops"
NUM_CROPS = 800  # of "sample:crops"
Say = Callable[[str], object]  # is told one line
KINDS = "a folder, folder:PATH, list:FILE, tfds:NAME[/SPLIT], sample or sample:crops"

# The color photographs inside scikit-image's wheel. Drawings are left out, and so is
# motorcycle_right.png: it is the other half of a stereo pair, so nothing held out
# would be new beside motorcycle_left.png.
_SAMPLES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
MOST_KINDS = 8  # of files left out are named
# NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION
_TFDS_NAME = re.compile(r"\w+(/[\w.-]+)?(:[\w.*]+)?")
_USUAL_SPLITS = ("train", "test", "validation")


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A photograph in its own file.

    Attributes:
      name: its path as the user gave it, on a disk or gs://bucket/a.jpg.
    """

    name: str

    def read(self, *, upright: bool = False) -> Image.Image:
        """Decodes the photograph to 8-bit RGB at full size, see `decode.read_rgb`.

        Args:
          upright: True turns it as its EXIF rotation says; the authors do not.

        Raises:
          UnreadableImage: the file cannot be read or decoded; the message begins with
            `name`.
        """
        return decode.read_rgb(self.source(), name=self.name, upright=upright)

    def source(self) -> str | bytes:
        """The file for Pillow to open: its path, or its bytes if it is in a bucket.

        Raises:
          UnreadableImage: the bucket does not give it; the message begins with `name`.
        """
        if not paths.is_remote(self.name):
            return self.name
        try:
            path = paths.as_path(self.name)
            with paths.answering(path):
                return path.read_bytes()
        except (OSError, ValueError) as error:
            raise decode.UnreadableImage(f"{self.name}: {error}") from error

    def stamp(self) -> tuple[int, int] | None:
        """Bytes, and time of the last change in ns; None if unknown, as in a bucket."""
        try:
            found = None if paths.is_remote(self.name) else os.stat(self.name)
        except OSError:
            return None
        return found and (found.st_size, found.st_mtime_ns)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A photograph in a split of a TFDS dataset.

    Attributes:
      split: the split.
      index: number of the record in the split, from 0.
    """

    split: "_TfdsSplit"
    index: int

    @property
    def name(self) -> str:
        """Dataset, version, split and number, such as "tfds:coco:1.0.0/train#7"."""
        return f"{self.split.name}#{self.index}"

    def read(self, *, upright: bool = False) -> Image.Image:
        """Decodes the photograph, as `File.read`."""
        try:
            content = self.split.images[self.index]["image"]
        except (OSError, RuntimeError, ValueError) as error:
            # array_record and pyarrow raise these on a missing or damaged file.
            raise decode.UnreadableImage(f"{self.name}: {error}") from error
        return decode.read_rgb(content, name=self.name, upright=upright)

    def label(self) -> int:
        """The number of its class; reads the whole record.

        Raises:
          UnreadableImage: as `read`.
        """
        try:
            return int(self.split.images[self.index]["label"])
        except (OSError, RuntimeError, ValueError) as error:
            raise decode.UnreadableImage(f"{self.name}: {error}") from error

    def stamp(self) -> None:
        """Nothing: a prepared dataset has a version, which is part of the name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Crop:
    """A square cut out of a photograph, as the crop's number determines.

    Attributes:
      file: the photograph.
      number: seeds place and side, which is at least half the photograph's short side.
    """

    file: File
    number: int

    @property
    def name(self) -> str:
        """The photograph's name and the number, such as "chelsea.png#7"."""
        return f"{self.file.name}#{self.number}"

    def read(self, *, upright: bool = False) -> Image.Image:
        """Decodes the photograph and crops it; errors as `File.read`."""
        image = self.file.read(upright=upright)
        rng = np.random.default_rng(self.number)
        side = int(min(image.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, x - side + 1)) for x in image.size)
        return image.crop((left, top, left + side, top + side))

    def stamp(self) -> tuple[int, int] | None:
        """That of the photograph."""
        return self.file.stamp()


Photograph = File | Record | Crop
"""One photograph, with a name that no other photograph has."""


def whole(photograph: Photograph) -> Photograph:
    """The photograph that a crop is of; any other is whole already."""
    return photograph.file if isinstance(photograph, Crop) else photograph


def open_photographs(spec: str, say: Say | None = None) -> Sequence[Photograph]:
    """Lists the photographs that `spec` names, without decoding any.

    Args:
      spec: one of

        `PATH` or `folder:PATH`: the files below a folder, on a disk or gs://bucket/…,
        in the order of `list_images`.

        `list:FILE`: the paths in a text file, one per line, in the order of the file,
        relative to the file's folder. Empty lines and lines that begin with # are
        skipped, blanks around a path too. Windows' line ends and byte order marks are
        no part of a path. A missing image is noticed when it is read.

        `tfds:NAME[/SPLIT]`: the feature `image` of a dataset that tensorflow_datasets
        has prepared as array_record or parquet (every process that reads a parquet
        split holds all of it in memory), below $TFDS_DATA_DIR or else
        ~/tensorflow_datasets. NAME is as for `tfds.builder`, with /CONFIG or :VERSION.
        The part after the last / is the split if the dataset has a split of that name,
        as in `imagenet2012/validation` or `imagenet2012/train[:10%]`; else the split is
        `train`. The order is that of the records.

        `sample`: the photographs inside scikit-image, see `sample_images`.

        `sample:crops`: `NUM_CROPS` random crops of them. Every second crop, which the
        usual training list leaves out, is of chelsea.png or motorcycle_left.png, the
        others are of the other six.

      say: told what is left out of a folder, by suffix.

    Raises:
      FileNotFoundError: there is no such folder, file, or prepared dataset.
      OSError: the folder, file or dataset cannot be read.
      ValueError: it holds no image, or `spec` has another form; says what is allowed.
    """
    kind, colon, rest = spec.partition(":")
    if colon and not rest:
        raise ValueError(f"{spec} names nothing; photographs are given as {KINDS}")
    if spec == SAMPLE:
        return [File(os.fspath(path)) for path in sample_images()]
    if spec == CROPS:
        return _sample_crops()
    if colon and kind == "list":
        return _listed(rest)
    if colon and kind == "tfds":
        return _tfds_records(rest)
    folder = rest if colon and kind == "folder" else spec
    other = colon and kind != "folder" and "://" not in spec
    if other and not Path(folder).exists():
        raise FileNotFoundError(
            f"no such image folder: {spec}; photographs are given as {KINDS}"
        )
    return [File(path) for path in _images_below(folder, say)]


# --- Folders --------------------------------------------------------------------------


def list_images(folder: str | os.PathLike, say: Say | None = None) -> list[Path]:
    """Lists the photographs below a local folder, in the same order on any disk.

    The authors took the order of `glob`, which depends on the file system. Here paths
    are sorted, because a repair learns from photographs in their order.

    Args:
      folder: searched recursively, through links to folders but not in circles.
      say: told how many other files there are, by suffix.

    Returns:
      Files named as one of `decode.FORMATS` in any case, but not those whose name or
      folder is hidden, such as the ._a.jpg of macOS. Sorted by their POSIX path
      relative to `folder`, as bytes (so `B.jpg` comes before `a.jpg`).

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: `folder` is a file, or there is no image below it.
    """
    return [Path(path) for path in _images_below(os.fspath(folder), say)]


def _images_below(folder: str, say: Say | None) -> list[str]:
    """The paths of the images below a folder, on a disk or in a bucket, in order."""
    path = paths.as_path(folder)
    with paths.answering(path):
        if not path.exists():
            raise FileNotFoundError(f"no such image folder: {folder}")
        walk = _walk_bucket if paths.is_remote(path) else _walk
        files = walk(os.fspath(path)) if path.is_dir() else None
        images, others = _sorted_out(files or ())
    if files is None:
        raise ValueError(f"got the file {folder}, expected a folder; give its folder")
    if not images:
        raise ValueError(
            f"no images in {folder}: looked there and in its sub-folders for files "
            f"ending in {', '.join(SUFFIXES)} in any case{_counted(': ', others)}"
        )
    if say and others:
        say(f"{folder}: {_counted('', others)}")
    prefix = os.fspath(path / "x")[:-1]
    return [prefix + name for name in sorted(images, key=os.fsencode)]


def _sorted_out(names: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """The images among names relative to a folder, and the number of others by kind."""
    images: list[str] = []
    others: Counter[str] = Counter()
    for name in names:
        hidden = "/." in f"/{name}"
        if name.lower().endswith(SUFFIXES) and not hidden:
            images.append(name)
        else:
            suffix = os.path.splitext(name)[1].lower() or "without suffix"
            others["hidden" if hidden else suffix] += 1
    return images, others


def _counted(before: str, others: Counter[str]) -> str:
    """Says how many files are left out, by kind; empty if there are none."""
    if not (count := others.total()):
        return ""
    kinds = ", ".join(f"{kind} {n}" for kind, n in others.most_common(MOST_KINDS))
    more = ", ..." if len(others) > MOST_KINDS else ""
    files = "file" if count == 1 else "files"
    return f"{before}{count} {files} of other suffixes left out ({kinds}{more})"


def _walk(
    folder: str, relative: str = "", ancestors: frozenset[str] = frozenset()
) -> Iterator[str]:
    # Strings and scandir, for ImageNet has 1.3 million files and a Path is slow.
    here = os.path.realpath(folder)
    if here in ancestors:  # a link back to a folder above
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                inside = f"{relative}{entry.name}/"
                yield from _walk(entry.path, inside, ancestors | {here})
            else:
                yield relative + entry.name


def _walk_bucket(folder: str) -> Iterator[str]:
    for name in fsspec.filesystem("gs").find(folder):
        yield name.removeprefix(folder.removeprefix(paths.BUCKET) + "/")


# --- Lists ----------------------------------------------------------------------------


def _listed(file: str) -> list[Photograph]:
    path = paths.as_path(file)
    with paths.answering(path):
        if not path.exists():
            raise FileNotFoundError(f"no such list of images: {file}")
        content = None if path.is_dir() else path.read_bytes()
    if content is None:
        raise ValueError(f"got the folder {file}, expected a file; give folder:{file}")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16") if wide else os.fsdecode(content)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(
            f"{file} is not text; a list has the path of an image on each line"
        )
    lines = [line.strip("\ufeff \t\r") for line in text.split("\n")]
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise ValueError(f"no images in {file}: give the path of an image on each line")
    prefix = os.fspath(path.parent / "x")[:-1]
    # Not ~name: an editor calls its copies so.
    named = [paths.expanded(x) if x.startswith("~/") else x for x in named]
    return [
        File(line if "://" in line or os.path.isabs(line) else prefix + line)
        for line in named
    ]


# --- TFDS -----------------------------------------------------------------------------


class _TfdsSplit(NamedTuple):
    """A split of a prepared dataset, opened by each process that reads from it.

    Attributes:
      name: first part of the names of its records.
      folder: of one version, with dataset_info.json in it.
      split: in the notation of tfds.
    """

    name: str
    folder: str
    split: str

    @property
    def images(self) -> Any:
        """Examples by index: dicts that hold the stored bytes of image files."""
        with _OPENING:
            return _opened(self)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of the feature `label`; empty if there is none."""
        import tensorflow_datasets as tfds

        info = tfds.builder_from_directory(self.folder).info
        label = dict(info.features.items()).get("label")
        found = label.names if isinstance(label, tfds.features.ClassLabel) else []
        return tuple(found)


_OPENING = threading.Lock()  # or each thread might open the same split


@functools.cache
def _opened(split: _TfdsSplit) -> Any:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(split.folder)
    features = builder.info.features.items()
    images = [name for name, f in features if isinstance(f, tfds.features.Image)]
    encoded = dict.fromkeys(images, tfds.decode.SkipDecoding())
    return builder.as_data_source(split=split.split, decoders=encoded)


def _tfds_records(spec: str) -> list[Photograph]:
    import tensorflow_datasets as tfds

    builder, split = _find_prepared(spec)
    info, folder = builder.info, os.fspath(builder.data_dir)
    name = "tfds:" + ":".join(info.full_name.rsplit("/", 1))
    stored = {file_format.value for file_format in info.available_file_formats()}
    if not stored & {"array_record", "parquet"}:
        raise ValueError(
            f"{name} is stored as {info.file_format.value}, which cannot be read image "
            f"by image; run `tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record`, which needs TensorFlow installed"
        )
    features = dict(info.features.items())
    if not isinstance(features.get("image"), tfds.features.Image):
        raise ValueError(
            f"{name} has no feature `image` that is an image; it has "
            f"{', '.join(sorted(features))}"
        )
    if "[" in split and "array_record" not in stored:
        # tfds 4.9 silently returns the whole split.
        raise ValueError(
            f"{name} is stored as parquet, got split {split}, expected a whole split"
        )
    opened = _TfdsSplit(f"{name}/{split}", folder, split)
    try:
        count = len(opened.images)
    except ValueError as error:  # a message of several lines
        raise ValueError(
            f"no images in {name}/{split}: {' '.join(str(error).split())}"
        ) from error
    if not count:
        raise ValueError(f"no images in {name}/{split}: the split is empty")
    return [Record(opened, index) for index in range(count)]


def _find_prepared(spec: str) -> tuple[Any, str]:
    """The builder of a prepared dataset, and the name of the split."""
    head, _, last = spec.rpartition("/")
    split = re.split(r"[\[+]", last)[0]
    lacking = ""
    for name, wanted, whole in ((head, last, split), (spec, "train", "train")):
        builder = _prepared(name)
        if builder is None:
            continue
        if whole in builder.info.splits:
            return builder, wanted
        splits = ", ".join(builder.info.splits)
        lacking = f"{builder.info.full_name} has no split {wanted}, only {splits}"
    if lacking:
        raise ValueError(f"tfds:{spec}: {lacking}")
    name = head if head and split in _USUAL_SPLITS else spec
    where = _tfds_folder()
    raise FileNotFoundError(
        f"no dataset {name} is prepared in {where} (TFDS_DATA_DIR); run `tfds build "
        f"{name} --file_format=array_record --data_dir={where}`, which needs "
        "TensorFlow installed"
    )


def _prepared(name: str) -> Any:
    """The builder of a dataset on this disk, or None; runs no code of the dataset."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    if not _TFDS_NAME.fullmatch(name):
        return None
    try:
        return read_only_builder.builder_from_files(name, data_dir=_tfds_folder())
    except tfds.core.DatasetNotFoundError:
        return None


def _tfds_folder() -> str:
    folder = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return paths.expanded(folder)


# --- The sample -----------------------------------------------------------------------


def sample_images() -> list[Path]:
    """Returns the color photographs inside scikit-image's wheel, sorted by name.

    The files are in the installed package: nothing is downloaded, and scikit-image
    itself is not imported.

    Raises:
      FileNotFoundError: scikit-image or all of its photographs are missing.
    """
    package = importlib.util.find_spec("skimage")
    folders = package.submodule_search_locations if package else None
    data = [Path(folder, "data") for folder in folders or ()]
    files = [
        path for folder in data for n in _SAMPLES if (path := folder / n).is_file()
    ]
    if not files:
        raise FileNotFoundError(
            "the sample photographs are part of scikit-image, which is not installed "
            f"or has none of {', '.join(_SAMPLES)}: run `pip install scikit-image` or "
            "give a folder of images"
        )
    return files


def _sample_crops() -> list[Photograph]:
    """In rounds, each of which has the photographs in another order.

    So crops at equal distances, as measures take them, are of several photographs.
    """
    files = [File(os.fspath(path)) for path in sample_images()]
    spare = files[1::4]
    kinds = [file for file in files if file not in spare], spare or files

    def file(number: int) -> File:
        of, place = kinds[number % 2], number // 2
        order = np.random.default_rng(place // len(of)).permutation(len(of))
        return of[order[place % len(of)]]

    return [Crop(file(number), number) for number in range(NUM_CROPS)]
