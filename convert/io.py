"""State dicts in files: `.pth` and `.pt` (needs torch) and `.safetensors` (does not).

    file --read_state_dict--> {PyTorch name: NumPy array} --write_state_dict--> file

The only place that imports torch, and only inside the functions that need it. Reading
never runs code that a file brings along; writing is whole or not at all.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from sinder_jax import checkpoint

StrPath = str | os.PathLike[str]
StateDict = dict[str, np.ndarray]
FORMATS = (".pth", ".pt", ".safetensors")


def read_state_dict(path: StrPath) -> StateDict:
    """Tensors of a PyTorch file by name, as NumPy arrays in the stored number format.

    Arrays of a `.pth` are views of the mapped file, so that it is read when used.

    Args:
      path: `.pth` or `.pt`, read with `weights_only=True`, or `.safetensors`.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: a directory, an unknown suffix, a damaged file, one that would run
        code (it does not), or one that holds anything but tensors by name; one line.
      ImportError: `.pth` without torch.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory; what is read is a file, {', '.join(FORMATS)}."
        )
    _check_suffix(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)


def write_state_dict(
    path: StrPath, state_dict: Mapping[str, np.ndarray], overwrite: bool = False
) -> None:
    """Writes tensors by name to the file `path`, which appears whole or not at all.

    The same tensors give the same bytes, whatever the name of the file.

    Args:
      path: `.pth`, `.pt` or `.safetensors`; its directory must exist.
      state_dict: arrays by PyTorch name.
      overwrite: whether an existing file is replaced.

    Raises:
      ValueError: an unknown suffix.
      FileExistsError: `path` exists, without `overwrite`.
      FileNotFoundError, PermissionError: its directory is missing or closed.
      OSError: writing failed, for example on a full disk.
      ImportError: `.pth` without torch.
    """
    path = Path(path)
    check_destination(path, overwrite)
    # Not ascontiguousarray, which makes a vector of a single number.
    arrays = {key: np.asarray(array, order="C") for key, array in state_dict.items()}
    write = _write_safetensors if _is_safetensors(path) else _write_torch
    with _replacing(path) as partial:
        try:
            write(partial, arrays)
        # Either library has its own error for, say, a full disk.
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise OSError(f"{path}: cannot be written ({error}).") from None


def check_destination(path: StrPath, overwrite: bool = False) -> None:
    """Refuses a file that cannot be written, before any work is done for it.

    Raises:
      As `write_state_dict`.
    """
    path = Path(path)
    _check_suffix(path)
    if not _is_safetensors(path):
        _import_torch(path)
    if not (overwrite and path.is_file()):
        checkpoint.check_destination(path)


def _check_suffix(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; {', '.join(FORMATS)} are allowed."
        )


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place, or is gone after a failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # as any new file; safetensors makes it private
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# --- safetensors ------------------------------------------------------------------


def _read_safetensors(path: Path) -> StateDict:
    try:
        return safetensors.numpy.load_file(path)
    # SafetensorError, and AttributeError for a format that NumPy has no name for.
    except Exception as error:
        raise _unreadable(path, "safetensors", error) from None


def _write_safetensors(path: Path, state_dict: StateDict) -> None:
    # The metadata is what Hugging Face's loaders look for.
    safetensors.numpy.save_file(state_dict, path, metadata={"format": "pt"})


# --- PyTorch ----------------------------------------------------------------------


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path}: {path.suffix} files need PyTorch: pip install "
            "'sinder_jax[torch]', or use a .safetensors file."
        ) from None
    return torch


def _read_torch(path: Path) -> StateDict:
    torch = _import_torch(path)
    try:
        with warnings.catch_warnings():
            # About pickles that are refused or read below, in words of our own.
            warnings.simplefilter("ignore")
            # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            stored = torch.load(
                path, map_location="cpu", weights_only=True, mmap=mapped
            )
    # Broken bytes make the unpickler raise anything: EOFError, KeyError, OSError …
    except Exception as error:
        raise _unreadable(path, "PyTorch", error) from None
    _check_is_state_dict(path, stored, torch.Tensor)
    try:
        return {key: _to_numpy(tensor, torch) for key, tensor in stored.items()}
    except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantized
        raise ValueError(f"{path}: {_reason(error)}; dense tensors are read.") from None


def _check_is_state_dict(path: Path, stored: Any, tensor_type: type) -> None:
    wanted = "a state dict, tensors by name, is what is read"
    if not isinstance(stored, Mapping):
        raise ValueError(f"{path}: holds a {type(stored).__name__}; {wanted}.")
    if not stored:
        raise ValueError(f"{path}: holds no tensor; {wanted}.")
    for key, value in stored.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            raise ValueError(
                f"{path}: {key!r} holds entries of its own, as in a training "
                f"checkpoint; {wanted}, as in the DINOv2 hub files."
            )
        if not (isinstance(key, str) and isinstance(value, tensor_type)):
            raise ValueError(
                f"{path}: entry {key!r} holds a {type(value).__name__}; {wanted}."
            )


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has none: the same bits by another name
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _write_torch(path: Path, state_dict: StateDict) -> None:
    torch = _import_torch(path)
    tensors = {key: _to_torch(array, torch) for key, array in state_dict.items()}
    # Given a path, torch.save would write its name into the file.
    with open(path, "xb") as file:
        torch.save(tensors, file)


def _to_torch(array: np.ndarray, torch: Any) -> Any:
    array = array if array.flags.writeable else array.copy()  # or torch warns
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    """One line out of an error that may fill a screen."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code or isinstance(error, pickle.UnpicklingError):
        what = (
            f"it would run code ({code[1]})" if code else "damaged, or would run code"
        )
        return ValueError(
            f"{path}: refused, {what}, and none was run; have the model saved as a "
            "plain state dict: torch.save(model.state_dict(), PATH)."
        )
    return ValueError(
        f"{path}: damaged, or no {kind} file ({_reason(error)}): fetch it again."
    )


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return re.split(r"\. |\n", text)[0][:200].rstrip(".")
