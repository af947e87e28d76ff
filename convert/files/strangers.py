"""What is given in place of weights, named for what it is, with what to do about it.

    path --check, by its first bytes--> an error that names it, or none
    folder without weights --describe--> what it is, in words

Only bytes and names are looked at.
"""

import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from convert.files import sha256

START = 1024  # bytes that are looked at
INDEX = ".safetensors.index.json"
# Weights of a Hugging Face directory, in the order in which transformers looks.
WEIGHTS = (sha256.MODEL, f"model{INDEX}", "pytorch_model.bin")

AGAIN = "fetch it again"
OTHER = "give the same model's .safetensors or .pth file"
UNPACK = "unpack it and give the file of weights in it"
SHARDS = (
    "one of the shards of FSDP training, not the whole model; give the run's "
    "eval/training_N/teacher_checkpoint.pth, or gather the shards first (FSDP's "
    "FULL_STATE_DICT)"
)
# By their first bytes.
MAGIC = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; run "
    "`git lfs pull` in its repository",
    b"/annex/objects": "a pointer of git-annex, not the file itself; run `git annex "
    "get` in its repository",
    b"\x1f\x8b": f"packed by gzip; {UNPACK}",
    b"BZh": f"packed by bzip2; {UNPACK}",
    b"\xfd7zXZ\0": f"packed by xz; {UNPACK}",
    b"\x28\xb5\x2f\xfd": f"packed by zstd; {UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7-Zip archive; {UNPACK}",
    b"Rar!\x1a\x07": f"a RAR archive; {UNPACK}",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file, of TensorFlow or Keras; {OTHER}",
    b"\x93NUMPY": f"an array of NumPy; {OTHER}",
    b"GGUF": f"a GGUF file, of llama.cpp; {OTHER}",
    b"\x89PNG": f"a picture; {OTHER}",
    b"\xff\xd8\xff": f"a picture; {OTHER}",
    b"%PDF": f"a PDF; {OTHER}",
}
SUFFIXES = {
    ".onnx": f"a graph of ONNX; {OTHER}",
    ".msgpack": f"weights for Flax; {OTHER}",
    ".h5": f"weights for TensorFlow; {OTHER}",
    ".distcp": "a part of a folder of torch.distributed.checkpoint; give the folder",
}
# By the packages whose classes a pickle names.
PACKAGES = {
    "torch.distributed": SHARDS,
    "deepspeed": "a checkpoint of DeepSpeed; make one file of it with zero_to_fp32.py, "
    "which stands beside it",
}


def check(path: Path, *, text: bool = False) -> None:
    """Refuses what is not a file of weights, by its first bytes.

    Args:
      path: something that exists.
      text: True for a file of JSON.

    Raises:
      ValueError: names what it is.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: neither a file nor a folder; give one of weights")
    with path.open("rb") as file:
        start = file.read(START)
    what = _by_bytes(start, path.suffix, text)
    if not what and path.suffix in SUFFIXES:
        what = f"{path.suffix!r} means {SUFFIXES[path.suffix]}"
    if what:
        raise ValueError(f"{path}: {what}")


def _by_bytes(start: bytes, suffix: str, text: bool) -> str | None:
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            return what
    if not start:
        return f"damaged, an empty file; {AGAIN}"
    if start[257:262] == b"ustar":
        return f"a tar archive; {UNPACK}"
    if start[:1] == b"\x08" and re.search(rb"pytorch|onnx", start[:99]):
        return SUFFIXES[".onnx"]
    if suffix == ".safetensors" and start.startswith(b"PK\3\4"):
        return "a zip archive, as PyTorch's files are; rename it to .pth"
    if suffix != ".safetensors" and re.match(rb'.{6}\0\0\{\s*"', start, re.DOTALL):
        return "a safetensors file by its bytes; rename it to .safetensors"
    words = _words(start)
    if words.startswith("<"):
        return (
            "a web page, not weights: the download failed, or wants you to log in; "
            f"{AGAIN}"
        )
    if words and not text:
        return f"text, not weights ({words[:60]!r}): the download failed; {AGAIN}"
    return None


def _words(start: bytes) -> str:
    """The first line of a text; empty for anything else, and for a few letters."""
    found = start.decode("utf-8-sig", errors="replace").replace("\ufffd", "\0")
    if len(start) < 12 or not "".join(found.split()).isprintable():
        return ""
    return found.strip().partition("\n")[0].strip()


def in_pickle(names: Iterable[str]) -> str | None:
    """What a pickle is that names these classes, "module.Class"; None: unknown."""
    for name in names:
        for package, what in PACKAGES.items():
            if name.startswith(f"{package}."):
                return what
    return None


def in_state_dict(names: Iterable[str]) -> str | None:
    """What a dict with these names is; None: it may be a model."""
    found = set(names)
    if any(name.endswith("flat_param") or "flat_param_" in name for name in found):
        return SHARDS
    if "param_groups" in found:
        return "the state of an optimizer, without weights; give the model's own file"
    return None


def describe(folder: Path, formats: Sequence[str]) -> str:
    """What a folder is that holds neither our checkpoint nor any of `WEIGHTS`.

    Args:
      folder: a directory, on a disk or in a bucket.
      formats: suffixes of weights that can be read.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    weights = [name for name in names if name.endswith(tuple(formats))]
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "a folder of torch.distributed.checkpoint, shards of FSDP training; make "
            "one file of it: python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {folder} model.pth"
        )
    if any(re.search(r"rank_?\d+", name) for name in weights):
        return f"a folder of such files as {weights[0]}, {SHARDS}"
    if {"blobs", "snapshots"} <= set(names):
        return "a model in the cache of huggingface_hub; give the folder in snapshots/"
    if weights:
        return f"a directory of other names; give one file of it: {weights[0]}"
    for suffix, what in SUFFIXES.items():
        if found := next((name for name in names if name.endswith(suffix)), None):
            return f"a directory with {found} alone, {what}"
    if "config.json" in names:
        return "a Hugging Face directory without its weights; fetch them again"
    return (
        f"a directory {'' if names else 'that is empty, '}without our metadata and "
        f"without {' or '.join(WEIGHTS)}"
    )
