"""PyTorch's own files, .pth, .pt and .bin, read without running what they bring along.

    file --check, unopened--> torch.load(weights_only, mapped) --> StateDict

A pickle is taken apart before torch sees it: it may name tensors and nothing else, and
neither it nor the archive around it may ask for memory that the file has no bytes for.
torch is imported only inside the functions that need it.
"""

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.state_dict import MOST_TEXT, Spec, StateDict, damaged, reason

MOST_PICKLE = 2**20  # bytes; the giant's has 0.1 MB
MOST_ENTRIES = 20_000

# All that a pickle of tensors names; torch's own list is longer.
HARMLESS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|sparse_tensor)"
    r"|torch (Size|device|\w+Storage|[a-z]+\d*)|torch\.storage \w+Storage"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)
# Under which a training checkpoint keeps the weights.
NESTED = ("teacher", "model", "state_dict", "model_state_dict")


def import_torch(path: Path) -> Any:
    """The torch module.

    Raises:
      ImportError: it is not installed; says what to install, and what needs it not.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path}: {path.suffix} files need PyTorch: pip install "
            "'sinder_jax[torch]', or use a .safetensors file."
        ) from None
    return torch


def open_torch_file(path: Path) -> StateDict:
    """As `read.open_state_dict`, of one .pth, .pt or .bin file."""
    torch = import_torch(path)
    size = path.stat().st_size
    # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    _check_archive(path) if mapped else _check_pickles(path)
    try:
        with warnings.catch_warnings():
            # About pickles that are refused or read below, in words of our own.
            warnings.simplefilter("ignore")
            stored = torch.load(
                path, map_location="cpu", weights_only=True, mmap=mapped
            )
    # Broken bytes make the unpickler raise anything: EOFError, KeyError, OSError …
    except Exception as error:
        raise _unreadable(path, error) from None
    stored, left_out = _weights(path, stored)
    _check_is_state_dict(path, stored, torch.Tensor)
    specs = {key: _spec(path, tensor, size) for key, tensor in stored.items()}
    metadata = _extra(path) if mapped else {}

    def read(key: str) -> np.ndarray:
        try:
            return _to_numpy(stored[key], torch)
        except (TypeError, RuntimeError) as error:  # quantized
            raise ValueError(f"{path}: {key}: {reason(error)}.") from None

    return StateDict(specs, read, [path], metadata, left_out=left_out)


def _check_archive(path: Path) -> None:
    """Refuses zip archives that are not what torch.save writes, unopened."""
    size = path.stat().st_size
    if _num_entries(path) > MOST_ENTRIES:
        raise damaged(path, "PyTorch", f"an archive of over {MOST_ENTRIES} entries")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise damaged(path, "PyTorch", "an archive with compressed entries")
            if sum(entry.file_size for entry in entries) > size:
                raise damaged(path, "PyTorch", "its entries claim more than its bytes")
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names):
                raise damaged(path, "PyTorch", "an archive with two entries of a name")
            pickles = [name for name in names if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise damaged(path, "PyTorch", "an archive without one data.pkl")
            if archive.getinfo(pickles[0]).file_size > MOST_PICKLE:
                raise damaged(path, "PyTorch", f"a pickle of over {MOST_PICKLE} bytes")
            with archive.open(pickles[0]) as file:
                _check_pickle(path, file)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise damaged(path, "PyTorch", reason(error)) from None


def _num_entries(path: Path) -> int:
    """What the end of a zip archive says; zipfile itself would list them all."""
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
    """The pickles at the start of a file that is no archive; tensors follow them."""
    with path.open("rb") as file:
        for _ in range(5):  # magic number, protocol, system, contents, storages
            if not _check_pickle(path, file):
                return


def _check_pickle(path: Path, file: Any) -> bool:
    """Refuses a pickle that names code; says whether a whole one was there."""
    start, whole = file.tell(), False
    for name, end in _names_in_pickle(file):
        if name is None:
            whole = True
        elif not HARMLESS.fullmatch(name):
            raise _would_run_code(path, name.replace(" ", "."))
        if end - start > MOST_PICKLE:
            raise damaged(path, "PyTorch", f"a pickle of over {MOST_PICKLE} bytes")
    return whole


def _names_in_pickle(file: Any) -> Iterator[tuple[str | None, int]]:
    """What a pickle imports, each with its place; None at its end, if it has one.

    The pickle is taken apart, not run. Where it is broken, the list ends: whatever
    torch then makes of the rest, it makes by its own list of harmless names.
    """
    try:
        for code, argument, position in pickletools.genops(file):
            if code.name in ("GLOBAL", "STOP"):
                yield None if code.name == "STOP" else str(argument), position or 0
    except (ValueError, EOFError, MemoryError, OverflowError):
        return


def _weights(path: Path, stored: Any) -> tuple[Any, list[str]]:
    """The state dict inside a training checkpoint, and what else that holds."""
    left_out: list[str] = []
    while isinstance(stored, Mapping):
        inside = [name for name in NESTED if isinstance(stored.get(name), Mapping)]
        if not inside:
            break
        left_out += [str(key) for key in stored if key != inside[0]]
        stored = stored[inside[0]]
    return stored, left_out


def _check_is_state_dict(path: Path, stored: Any, tensor_type: type) -> None:
    wanted = "a state dict, tensors by name, is what is read"
    if not isinstance(stored, Mapping):
        raise ValueError(f"{path}: holds a {type(stored).__name__}; {wanted}.")
    if not stored:
        raise ValueError(f"{path}: holds no tensor; {wanted}.")
    for key, value in stored.items():
        if not (isinstance(key, str) and isinstance(value, tensor_type)):
            raise ValueError(
                f"{path}: entry {str(key)[:80]!r} holds a {type(value).__name__}; "
                f"{wanted}."
            )


def _spec(path: Path, tensor: Any, size: int) -> Spec:
    if tensor.layout.__str__() != "torch.strided":
        name = str(tensor.layout).removeprefix("torch.").title()
        raise ValueError(f"{path}: holds a {name} tensor; dense tensors are read.")
    # A view may repeat one number 2^60 times.
    if tensor.numel() * tensor.element_size() > size:
        raise damaged(path, "PyTorch", "a tensor claims more than its bytes")
    return Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has none: the same bits by another name
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _extra(path: Path) -> dict[str, str]:
    """Text that `convert.write` put beside the tensors."""
    with zipfile.ZipFile(path) as archive:
        return {
            Path(name).name: archive.read(name).decode(errors="replace")
            for name in archive.namelist()
            if "/extra/" in name and archive.getinfo(name).file_size <= MOST_TEXT
        }


def _unreadable(path: Path, error: Exception) -> ValueError:
    """One line out of an error that may fill a screen."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code or isinstance(error, pickle.UnpicklingError):
        return _would_run_code(path, code[1] if code else None)
    return damaged(path, "PyTorch", reason(error))


def _would_run_code(path: Path, code: str | None) -> ValueError:
    what = f"it would run code ({code})" if code else "damaged, or would run code"
    return ValueError(
        f"{path}: refused, {what}, and none was run; have the model saved as a "
        "plain state dict: torch.save(model.state_dict(), PATH)."
    )
