"""PyTorch files written tensor by tensor: .safetensors, .pth, Hugging Face directories.

    specs, (name, tensor), ... --write_tensors--> FILE, whole or not at all, FILE.sha256

A file never needs the memory of all its tensors: each is written to its place as it
comes, in any order. The same tensors and metadata give the same bytes.
"""

import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert import read, torch_file
from convert.names import specs_of
from convert.state_dict import Spec
from sinder_jax import checkpoint, vit

StrPath = str | os.PathLike[str]
FORMATS = (".pth", ".pt", ".safetensors")
NAMES = {dtype.name: name for name, dtype in read.DTYPES.items()}

Tensors = Iterable[tuple[str, np.ndarray]]
# Metadata is asked for after the last tensor, with what only then is known (digests);
# its texts have the lengths of those asked for before the first.
Metadata = Callable[[], Mapping[str, str]]


class Writes(Protocol):
    """How one kind of file is written."""

    def __call__(
        self, path: Path, specs: Mapping[str, Spec], tensors: Tensors, meta: Metadata
    ) -> None: ...


def write_state_dict(
    path: StrPath,
    state_dict: Mapping[str, np.ndarray],
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors by name to the file `path`, which appears whole or not at all.

    Beside it, `path`.sha256 holds its SHA-256, to be checked by `sha256sum -c`.

    Args:
      path: `.pth`, `.pt` or `.safetensors`; its directory must exist.
      state_dict: arrays by PyTorch name.
      overwrite: whether an existing file is replaced.
      metadata: text by name to go into the file.

    Raises:
      ValueError: an unknown suffix.
      FileExistsError: `path` or its `.sha256` exists, without `overwrite`.
      FileNotFoundError, PermissionError: its directory is missing or closed.
      OSError: writing failed, for example on a full disk.
      ImportError: `.pth` without torch.
    """
    tensors = ((key, np.asarray(array)) for key, array in state_dict.items())
    write_tensors(
        path, specs_of(state_dict), tensors, lambda: metadata or {}, overwrite
    )


def write_tensors(
    path: StrPath,
    specs: Mapping[str, Spec],
    tensors: Tensors,
    metadata: Metadata = dict,
    overwrite: bool = False,
) -> None:
    """`write_state_dict` of tensors that come one by one.

    Args:
      path: as there.
      overwrite: as there.
      specs: shape and number format of every tensor, in the order of a `.pth`.
      tensors: names and arrays, in any order, each once.
      metadata: called before the first tensor and again after the last; the second
        answer is stored and must have texts of the same lengths.

    Raises:
      As `write_state_dict`.
    """
    path = Path(path)
    check_destination(path, overwrite)
    write: Writes = _safetensors if path.suffix == ".safetensors" else _torch
    side = read.side_file(path)
    with _replacing(path) as partial:
        try:
            write(partial, specs, tensors, metadata)
        except RuntimeError as error:  # torch's own error for, say, a full disk
            raise OSError(f"{path}: cannot be written ({error}).") from None
        sha256 = read.sha256_of_file(partial)
        side.unlink(missing_ok=True)  # never beside a file that it is not of
    _write_text(side, f"{sha256}  {path.name}\n")


def write_hugging_face(
    path: StrPath,
    config: vit.ViTConfig,
    specs: Mapping[str, Spec],
    tensors: Tensors,
    metadata: Metadata = dict,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Writes a directory that transformers' `from_pretrained` loads.

    It holds model.safetensors, config.json, preprocessor_config.json and, for all
    three, model.safetensors.sha256.

    Args:
      path: a directory that does not exist, in one that does.
      config: the architecture.
      specs: as for `write_tensors`.
      tensors: as for `write_tensors`.
      metadata: as for `write_tensors`.
      files: JSON objects by file name, in place of those made from `config`.

    Raises:
      FileExistsError, FileNotFoundError, PermissionError: `path` cannot be made.
      OSError: writing failed.
    """
    path = Path(path)
    checkpoint.check_destination(path)
    files = files or {
        read.CONFIG: hugging_face_config(config),
        "preprocessor_config.json": PREPROCESSOR,
    }
    with _replacing(path) as partial:
        partial.mkdir()
        write_tensors(partial / read.WEIGHTS[0], specs, tensors, metadata)
        side = read.side_file(partial / read.WEIGHTS[0])
        lines = side.read_text()
        for name, value in files.items():
            _write_text(partial / name, json.dumps(value, indent=2) + "\n")
            lines += f"{read.sha256_of_file(partial / name)}  {name}\n"
        _write_text(side, lines)


def check_destination(path: StrPath, overwrite: bool = False) -> None:
    """Refuses a file that cannot be written, before any work is done for it.

    Raises:
      As `write_state_dict`.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; {', '.join(FORMATS)} are allowed."
        )
    if path.suffix != ".safetensors":
        torch_file.import_torch(path)
    for file in (path, read.side_file(path)):
        if not (overwrite and file.is_file()):
            checkpoint.check_destination(file)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file or directory beside `path` that takes its place, or is gone on failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with _replacing(path) as partial:
        partial.write_text(text)


def remove(path: Path) -> None:
    """Removes a file with its side file, or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
        return
    read.side_file(path).unlink(missing_ok=True)
    path.unlink()


# --- safetensors ------------------------------------------------------------------


def _safetensors(
    path: Path, specs: Mapping[str, Spec], tensors: Tensors, meta: Metadata
) -> None:
    header, offsets, size = _layout(specs, meta())
    with path.open("xb") as file:
        file.write(header)
        file.truncate(len(header) + size)
        for key, array in tensors:
            file.seek(len(header) + offsets[key])
            _write_array(file, array, specs[key])
        final, _, _ = _layout(specs, meta())
        assert len(final) == len(header), "metadata changed its length"
        file.seek(0)
        file.write(final)


def _layout(
    specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Header, offsets and size of the data, laid out as the safetensors library does.

    Larger number formats stand first, then names in order: all is aligned.
    """
    # The entry "format" is what Hugging Face's loaders look for.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offsets, end = {}, 0
    for key in sorted(
        specs, key=lambda key: (-np.dtype(specs[key].dtype).itemsize, key)
    ):
        start, end = end, end + _num_bytes(specs[key])
        offsets[key] = start
        header[key] = {
            "dtype": NAMES[specs[key].dtype],
            "shape": list(specs[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def _num_bytes(spec: Spec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def _write_array(file: Any, array: np.ndarray, spec: Spec) -> None:
    assert Spec(array.shape, array.dtype.name) == spec, f"not as announced: {spec}"
    file.write(_bytes(array))


def _bytes(array: np.ndarray) -> memoryview:
    # Not ascontiguousarray, which makes a vector of a single number.
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


# --- PyTorch ----------------------------------------------------------------------


def _torch(
    path: Path, specs: Mapping[str, Spec], tensors: Tensors, meta: Metadata
) -> None:
    """An archive that torch lays out and leaves empty, filled tensor by tensor."""
    torch = torch_file.import_torch(path)
    meta()
    # Of memory that is never touched.
    empty = {
        key: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        for key, spec in specs.items()
    }
    # Given a path, torch.save would write its name into the file.
    with path.open("xb") as file, torch.serialization.skip_data():
        torch.save(empty, file)
    with zipfile.ZipFile(path) as archive:
        top = archive.namelist()[0].partition("/")[0]
        records = {
            key: archive.getinfo(f"{top}/data/{i}") for i, key in enumerate(specs)
        }
        directory = archive.start_dir
    with path.open("r+b") as file:
        checksums = {}
        for key, array in tensors:
            record = records[key]
            file.seek(_start_of_data(file, record.header_offset))
            _write_array(file, array, specs[key])
            checksums[record.filename] = zlib.crc32(_bytes(array)).to_bytes(4, "little")
            # The checksum stands behind the data, after a signature, …
            file.seek(4, os.SEEK_CUR)
            file.write(checksums[record.filename])
        _write_checksums(file, directory, checksums)
    _add_extra(path, meta())


def _start_of_data(file: Any, header: int) -> int:
    file.seek(header + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return header + 30 + name + extra


def _write_checksums(file: Any, directory: int, checksums: Mapping[str, bytes]) -> None:
    """… and again in the directory at the end of the archive."""
    while True:
        file.seek(directory)
        entry = file.read(46)
        if entry[:4] != b"PK\1\2":
            return
        name, extra, comment = struct.unpack("<HHH", entry[28:34])
        checksum = checksums.get(file.read(name).decode())
        if checksum:
            file.seek(directory + 16)
            file.write(checksum)
        directory += 46 + name + extra + comment


def _add_extra(path: Path, metadata: Mapping[str, str]) -> None:
    """Texts as further entries of the archive, which torch.load passes over."""
    if not metadata:
        return
    with zipfile.ZipFile(path, "a") as archive:
        top = archive.namelist()[0].partition("/")[0]
        for name, text in metadata.items():
            # Without a time of writing: the same tensors, the same bytes.
            entry = zipfile.ZipInfo(f"{top}/extra/{name}", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, text)


# --- Hugging Face -----------------------------------------------------------------

# facebook/dinov2-base, preprocessor_config.json: the same for all its sizes.
PREPROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 256},
}


def hugging_face_config(config: vit.ViTConfig) -> dict[str, Any]:
    """The config.json of transformers' Dinov2Config or Dinov2WithRegistersConfig."""
    registers = config.num_register_tokens
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    told = {
        "architectures": [f"{name}Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "use_swiglu_ffn": config.ffn_layer == "swiglu",
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.LAYER_NORM_EPSILON,
        "qkv_bias": True,
        "num_channels": 3,
        "layerscale_value": 1.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    return told | ({"num_register_tokens": registers} if registers else {})
