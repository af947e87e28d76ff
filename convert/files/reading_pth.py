"""Reads PyTorch's own files, .pth, .pt and .bin, without running code from them.

    file --checked first--> torch.load(weights_only, mapped) --> StateDict

A pickle is taken apart before torch sees it: it may name tensors and nothing else, and
neither it nor the archive around it may ask for memory that the file has no bytes for.
torch is imported only inside the functions that need it.
"""

import io
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from convert.files import strangers
from convert.files.tensors import MOST_TEXT, Spec, StateDict, damaged
from sinder_jax.storage import paths
from sinder_jax.storage.errors import reading, reason_of

MOST_PICKLE = 2**20  # bytes; the giant's has 0.1 MB
MOST_ENTRIES = 20_000
CHUNK = 2**20  # bytes
# What zipfile and struct raise about an archive's fields.
BROKEN_ZIP = (
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)

# All that a pickle of tensors names; torch's own list of harmless names is longer.
HARMLESS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|sparse_tensor)"
    r"|torch (Size|device|\w+Storage|[a-z]+\d*)|torch\.storage \w+Storage"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)
# Entries under which a training checkpoint keeps the weights.
NESTED = ("teacher", "model", "state_dict", "model_state_dict")


def import_torch(path: Path) -> Any:
    """Returns the torch module.

    Raises:
      ImportError: it is not installed; says what to install, and what works without it.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path}: {path.suffix} files need PyTorch: pip install "
            "'sinder_jax[torch]', or use a .safetensors file"
        ) from None
    return torch


def open_pth(path: Path) -> StateDict:
    """Opens one .pth, .pt or .bin file; errors as for `reading.open_state_dict`."""
    torch = import_torch(path)
    paths.check_is_text(path)
    size = path.stat().st_size
    # Files older than PyTorch 1.6 are not zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    _check_archive(path) if mapped else _check_pickles(path)
    # Broken bytes make torch's unpickler raise anything.
    with reading(path, (Exception,), lambda error: _unreadable(path, error)):
        with warnings.catch_warnings():
            # torch warns of pickles that are refused or read below in our own words.
            warnings.simplefilter("ignore")
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    nest, stored, left_out = _weights(whole)
    _check_is_state_dict(path, stored, torch.Tensor)
    specs = {key: _spec(path, tensor, size) for key, tensor in stored.items()}
    if mapped:
        _check_lengths(path, stored.values())
    metadata = _extra(path) if mapped else {}

    def read(key: str) -> np.ndarray:
        try:
            return _to_numpy(stored[key], torch)
        except (TypeError, RuntimeError) as error:  # quantized
            raise ValueError(f"{path}: {key}: {reason_of(error)}") from None

    return StateDict(specs, read, [path], metadata, left_out, whole, nest)


# --- Before torch sees the file -----------------------------------------------------


def _check_archive(path: Path) -> None:
    """Refuses zip archives that torch.save does not write."""
    if _num_entries(path) > MOST_ENTRIES:
        raise damaged(path, "PyTorch", f"an archive of over {MOST_ENTRIES} entries")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            pickles = [x for x in entries if x.filename.endswith("data.pkl")]
            large = [x for x in pickles if x.file_size > MOST_PICKLE]
            claimed = sum(entry.file_size for entry in entries)
            found = {
                "compressed entries": any(x.compress_type for x in entries),
                "entries of more bytes than it has": claimed > path.stat().st_size,
                "two entries of one name": len(names) < len(entries),
                "no data.pkl, or several": len(pickles) != 1,
                f"a pickle of over {MOST_PICKLE} bytes": bool(large),
            }
            if any(name.endswith("/constants.pkl") for name in names):
                raise ValueError(
                    f"{path}: a TorchScript archive, which is code; save its weights: "
                    "torch.save(torch.jit.load(PATH).state_dict(), NEW.pth)"
                )
            if wrong := [what for what, is_there in found.items() if is_there]:
                raise damaged(path, "PyTorch", f"an archive with {wrong[0]}")
            with path.open("rb") as file:
                seek_record(file, pickles[0])
                _check_pickle(path, io.BytesIO(file.read(pickles[0].file_size)))
            # Torch ignores checksums; they are 0 where torch.save was to omit them.
            for entry in (entry for entry in entries if entry.CRC):
                with archive.open(entry) as file:
                    while file.read(CHUNK):
                        pass
    except BROKEN_ZIP as error:
        raise damaged(path, "PyTorch", reason_of(error)) from None


def seek_record(file: BinaryIO, entry: zipfile.ZipInfo) -> None:
    """Goes to the first byte of an entry that is stored as it is."""
    # The lengths of name and padding end the record's own header.
    file.seek(entry.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)


def _num_entries(path: Path) -> int:
    """Number of entries by the end of a zip archive; zipfile would list them all."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 22))
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    small = struct.unpack_from("<H", tail, end + 10)[0] if end >= 0 else 0
    large = tail.rfind(b"PK\6\6")
    if small == 0xFFFF and large >= 0 and len(tail) >= large + 40:
        return struct.unpack_from("<Q", tail, large + 32)[0]
    return small


def _check_pickles(path: Path) -> None:
    """Checks the pickles at the start of a file that is not an archive."""
    with path.open("rb") as file:
        for _ in range(5):  # magic number, protocol, system, contents, storages
            if not _check_pickle(path, file):
                return


def _check_pickle(path: Path, file: Any) -> bool:
    """Refuses a pickle that names code; False if the pickle has no end."""
    start, whole, names = file.tell(), False, []
    for name, end in _names_in_pickle(file):
        if name is None:
            whole = True
        elif not HARMLESS.fullmatch(name):
            names.append(name.replace(" ", "."))
        if end - start > MOST_PICKLE:
            raise damaged(path, "PyTorch", f"a pickle of over {MOST_PICKLE} bytes")
    if what := strangers.in_pickle(names):
        raise ValueError(f"{path}: {what}")
    if names:
        raise _would_run_code(path, names[0])
    return whole


def _names_in_pickle(file: Any) -> Iterator[tuple[str | None, int]]:
    """Yields what a pickle imports, each with its position, and None at its end.

    The pickle is taken apart, not run. A broken pickle ends the list: whatever torch
    then makes of the rest, it uses its own list of harmless names.
    """
    try:
        for code, argument, position in pickletools.genops(file):
            if code.name in ("GLOBAL", "STOP"):
                yield None if code.name == "STOP" else str(argument), position or 0
    except (ValueError, EOFError, MemoryError, OverflowError):
        return


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Torch's error, which may fill a screen, in one line."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code or isinstance(error, pickle.UnpicklingError):
        return _would_run_code(path, code[1] if code else None)
    return damaged(path, "PyTorch", reason_of(error))


def _would_run_code(path: Path, code: str | None) -> ValueError:
    what = f"it would run code ({code})" if code else "damaged, or would run code"
    return ValueError(
        f"{path}: refused, {what}, and none was run; have the model saved as a "
        "plain state dict: torch.save(model.state_dict(), PATH)"
    )


# --- What torch found ---------------------------------------------------------------


def _weights(stored: Any) -> tuple[tuple[str, ...], Any, list[str]]:
    """Where in a training checkpoint the state dict is, the dict, names of the rest."""
    nest: tuple[str, ...] = ()
    left_out: list[str] = []
    while isinstance(stored, Mapping):
        inside = [name for name in NESTED if isinstance(stored.get(name), Mapping)]
        if not inside:
            break
        left_out += [str(key) for key in stored if key != inside[0]]
        stored = stored[inside[0]]
        nest += (inside[0],)
    return nest, stored, left_out


def _check_is_state_dict(path: Path, stored: Any, tensor_type: type) -> None:
    wanted = "expected a state dict, which maps names to tensors"
    if not isinstance(stored, Mapping):
        raise ValueError(f"{path}: got a {type(stored).__name__}, {wanted}")
    if what := strangers.in_state_dict(map(str, stored)):
        raise ValueError(f"{path}: {what}")
    if not stored:
        raise ValueError(f"{path}: holds no tensor, {wanted}")
    for key, value in stored.items():
        if not (isinstance(key, str) and isinstance(value, tensor_type)):
            raise ValueError(
                f"{path}: got a {type(value).__name__} in entry {str(key)[:80]!r}, "
                f"{wanted}"
            )


def _spec(path: Path, tensor: Any, size: int) -> Spec:
    if str(tensor.layout) != "torch.strided":
        name = str(tensor.layout).removeprefix("torch.").title()
        raise ValueError(f"{path}: got a {name} tensor, expected dense ones")
    # A view may repeat one number 2^60 times.
    if tensor.numel() * tensor.element_size() > size:
        raise damaged(path, "PyTorch", "a tensor claims more bytes than the file has")
    return Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy lacks it: the same bits by another name
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _check_lengths(path: Path, tensors: Iterable[Any]) -> None:
    """Refuses a tensor whose record has another length: mapped, it would read on."""
    storages = {
        x.data_ptr(): x.nbytes() for x in (t.untyped_storage() for t in tensors)
    }
    claimed = Counter(size for size in storages.values() if size)
    with zipfile.ZipFile(path) as archive:
        if claimed - Counter(entry.file_size for entry in archive.infolist()):
            raise damaged(path, "PyTorch", "a tensor and its record differ in length")


def _extra(path: Path) -> dict[str, str]:
    """The text that `convert.files.writing` put beside the tensors."""
    with zipfile.ZipFile(path) as archive:
        return {
            Path(entry.filename).name: archive.read(entry).decode(errors="replace")
            for entry in archive.infolist()
            if "/extra/" in entry.filename
            and entry.CRC  # ours have a checksum
            and entry.file_size <= MOST_TEXT
        }
