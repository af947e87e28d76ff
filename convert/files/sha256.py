"""SHA-256 of files, and the side file that lists it as `sha256sum` does.

FILE, FILE.sha256 --check--> the files that were verified, or an error by name

A name is bytes. As in coreutils, a line begins with a backslash where a backslash or
line break of the name is escaped.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

MODEL = "model.safetensors"  # the weights of a Hugging Face directory
SUFFIX = ".sha256"
ESCAPED = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}  # the last since coreutils 9
# What `sha256sum` prints: by default, in binary mode, with --tag.
LINE = re.compile(
    rb"(?P<escaped>\\?)(?:(?P<hex>[0-9a-fA-F]{64}) [ *](?P<name>[^\n]+)"
    rb"|SHA256 \((?P<tagged>[^\n]+)\) = (?P<last>[0-9a-fA-F]{64}))"
)
MOST_BYTES = 2**20  # of a side file


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(files: Sequence[Path], known: Mapping[Path, str] | None = None) -> str:
    """SHA-256 of one file, or of the lines that `sha256sum` prints for several.

    Args:
      files: at least one.
      known: SHA-256 of files that need not be read again.
    """
    digests = [(known or {}).get(file) or of_file(file) for file in files]
    if len(files) == 1:
        return digests[0]
    return hashlib.sha256(b"".join(map(line, files, digests))).hexdigest()


def line(path: Path, digest: str = "") -> bytes:
    """The line that `sha256sum` prints for a file."""
    name = os.fsencode(path.name)
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    mark = b"\\" if escaped != name else b""
    return mark + (digest or of_file(path)).encode() + b"  " + escaped + b"\n"


def side_file(path: Path) -> Path:
    """The .sha256 beside a file, or beside the weights of a Hugging Face directory."""
    if path.is_dir():
        path = path / MODEL
    return path.with_name(f"{path.name}{SUFFIX}")


def check(path: Path) -> dict[Path, str]:
    """Compares a file or directory with its side file.

    Returns:
      SHA-256 of the files that were verified; empty if there is no side file.

    Raises:
      ValueError: a file is missing or its bytes have changed, or the side file is not a
        list of digests.
    """
    side = side_file(path)
    if not side.is_file():
        return {}
    if side.stat().st_size > MOST_BYTES:
        raise ValueError(f"{side}: damaged, not a list of SHA-256 digests")
    verified = {}
    for entry in side.read_bytes().rstrip(b"\r\n").split(b"\n"):
        digest, name = _parsed(entry.removesuffix(b"\r"))
        file = side.parent / name
        if not digest or file.name != name:
            raise ValueError(f"{side}: damaged, not a list of SHA-256 digests")
        if not file.is_file():
            raise ValueError(f"{file}: missing, but {side} lists it")
        if of_file(file) != digest:
            raise ValueError(
                f"{file}: damaged, its SHA-256 is not the one in {side}; fetch or "
                "convert it again"
            )
        verified[file] = digest
    return verified


def _parsed(entry: bytes) -> tuple[str, str]:
    """Digest and file name of a line; both empty for any other line."""
    found = LINE.fullmatch(entry)
    if found is None:
        return "", ""
    name = found["name"] or found["tagged"]
    if found["escaped"]:
        name = re.sub(rb"\\.", lambda pair: ESCAPED.get(pair[0], pair[0]), name)
    return (found["hex"] or found["last"]).decode().lower(), os.fsdecode(name)
