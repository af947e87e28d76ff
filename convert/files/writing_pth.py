"""Writes .pth and .pt files tensor by tensor.

specs --torch.save, without data--> an archive of the final size
(name, tensor), ... --> each tensor and its checksum in their places
"""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.files.reading_pth import import_torch, seek_record
from convert.files.tensors import Spec
from convert.files.writing_safetensors import Metadata, Tensors, bytes_of, write_array


def write(
    path: Path, specs: Mapping[str, Spec], tensors: Tensors, metadata: Metadata
) -> None:
    """Writes a new file; arguments as for `writing.write_tensors`."""
    torch = import_torch(path)
    metadata()  # asked before the first tensor, as for the other format
    # In memory that is never touched.
    empty = {
        key: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        for key, spec in specs.items()
    }
    # Given a path, torch.save would write its name into the file.
    with path.open("xb") as file, torch.serialization.skip_data():
        torch.save(empty, file)
    with zipfile.ZipFile(path) as archive:
        top, entry = archive.namelist()[0].partition("/")[0], archive.start_dir
        entries = {}  # where the directory at the archive's end lists each record
        for info in archive.infolist():
            entries[info.filename] = entry
            entry += 46 + len(info.filename) + len(info.extra) + len(info.comment)
        records = {
            key: archive.getinfo(f"{top}/data/{i}") for i, key in enumerate(specs)
        }
    with path.open("r+b") as file:
        for key, array in tensors:
            record = records[key]
            seek_record(file, record)
            write_array(file, array, specs[key])
            checksum = zlib.crc32(bytes_of(array)).to_bytes(4, "little")
            # It follows the data after a signature, and stands in the directory.
            file.seek(4, os.SEEK_CUR)
            file.write(checksum)
            file.seek(entries[record.filename] + 16)
            file.write(checksum)
    _add_texts(path, top, metadata())


def write_whole(path: Path, contents: Any, texts: Mapping[str, str]) -> None:
    """Writes all that a training checkpoint holds, as torch.save does.

    Args:
      path: a new file.
      contents: what torch.load returned, tensors in a file included.
      texts: as `metadata` returns them in `write`.
    """
    torch = import_torch(path)
    with path.open("xb") as file:  # given a path, it would write its name into the file
        torch.save(contents, file)
    with zipfile.ZipFile(path) as archive:
        top = archive.namelist()[0].partition("/")[0]
    _add_texts(path, top, texts)


def like(tensor: Any, array: np.ndarray) -> Any:
    """The array as a tensor of the same class: a Parameter stays one."""
    torch = import_torch(Path())
    if array.dtype == ml_dtypes.bfloat16:  # torch does not know it as NumPy's
        made = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        made = torch.from_numpy(array)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _add_texts(path: Path, top: str, texts: Mapping[str, str]) -> None:
    """Adds entries that torch.load ignores, without a time of writing."""
    with zipfile.ZipFile(path, "a") as archive:
        for name, text in texts.items():
            extra = zipfile.ZipInfo(f"{top}/extra/{name}", (1980, 1, 1, 0, 0, 0))
            archive.writestr(extra, text)
