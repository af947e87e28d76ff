"""Writes .pth and .pt files tensor by tensor.

specs --torch.save, without data--> an archive of the final size
(name, tensor), ... --> each tensor and its checksum in their places
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files.reading_pth import import_torch
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
            write_array(file, array, specs[key])
            checksums[record.filename] = zlib.crc32(bytes_of(array)).to_bytes(
                4, "little"
            )
            # The checksum follows the data after a signature ...
            file.seek(4, os.SEEK_CUR)
            file.write(checksums[record.filename])
        _write_checksums(file, directory, checksums)
    _add_extra(path, metadata())


def _start_of_data(file: Any, header: int) -> int:
    file.seek(header + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return header + 30 + name + extra


def _write_checksums(file: Any, directory: int, checksums: Mapping[str, bytes]) -> None:
    """... and stands once more in the directory at the end of the archive."""
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
    """Adds texts as further entries of the archive, which torch.load ignores."""
    if not metadata:
        return
    with zipfile.ZipFile(path, "a") as archive:
        top = archive.namelist()[0].partition("/")[0]
        for name, text in metadata.items():
            # No time of writing: the same tensors give the same bytes.
            entry = zipfile.ZipInfo(f"{top}/extra/{name}", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, text)
