"""SHA-256 of files, and the side file that lists it as `sha256sum` does.

FILE, FILE.sha256 --check--> the files that were verified, or an error by name
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

MODEL = "model.safetensors"  # the weights of a Hugging Face directory
SUFFIX = ".sha256"
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
    lines = map(line, files, digests)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def line(path: Path, digest: str = "") -> str:
    """The line that `sha256sum` prints for a file."""
    return f"{digest or of_file(path)}  {path.name}\n"


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
    for entry in side.read_text(errors="replace").splitlines():
        digest, _, name = entry.partition("  ")
        file = side.parent / name
        if len(digest) != 64 or not name or file.name != name:
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
