"""Rows of one big array, kept in a folder, written in chunks, each with its digest.

    key --open_rows--> Rows: which chunks are missing   (a wrong digest: missing too)
    chunk --write--> DIR/rows.bin, a line of DIR/chunks.jsonl
    all chunks there --array--> a read-only memory map

A killed writer loses the chunk that it was computing. Nothing is flushed to the disk:
after a power loss a chunk may have a line and no bytes, which its digest shows. The
folder's name is a digest of the key, so another key means another folder.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sinder_jax.storage import errors, files, header

VERSION = 1  # of the files; after a change everything is computed anew
HEADER, CHUNKS, ROWS = "header.json", "chunks.jsonl", "rows.bin"
FORMATS = ("float32", "float16")


def folder_of(parent: Path, key: Mapping[str, Any]) -> Path:
    """Where the rows of a key are kept.

    Args:
      parent: holds the folders of all keys.
      key: all that the rows depend on; JSON values.
    """
    digest = hashlib.sha256(header.check_json(dict(key)).encode()).hexdigest()
    return parent / digest[:16]


@contextmanager
def open_rows(
    folder: Path,
    key: Mapping[str, Any],
    *,
    count: int,
    shape: tuple[int, ...],
    dtype: str = "float32",
    chunk: int = 64,
) -> Iterator["Rows"]:
    """Opens the rows of a key, those that are there verified, for one writer at a time.

    Args:
      folder: made if it does not exist.
      key: all that the rows depend on; JSON values.
      count: number of rows.
      shape: of a row.
      dtype: as which numbers are stored, one of `FORMATS`.
      chunk: rows in a chunk; of a folder that exists, its own number counts.

    Raises:
      ValueError: the folder holds the rows of another key, another process is writing
        to it, or `dtype` is unknown.
      OSError: it cannot be read or written.
    """
    if dtype not in FORMATS:
        raise ValueError(f"got dtype {dtype!r}, expected {' or '.join(FORMATS)}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / CHUNKS, "a+b") as lines:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is writing these features; wait for it, or "
                "choose another folder"
            ) from None
        told = {
            "version": VERSION,
            "key": dict(key),
            "count": count,
            "shape": list(shape),
            "dtype": dtype,
            "chunk": chunk,
        }
        kept = _check(folder, told)
        if kept is None:
            lines.truncate(0)
            (folder / ROWS).unlink(missing_ok=True)
            files.write(folder / HEADER, _signed(told))
        with open(folder / ROWS, "a+b"):
            pass
        with open(folder / ROWS, "r+b") as content:
            yield Rows(folder, kept or told, lines, content)


def _signed(told: Mapping[str, Any]) -> str:
    text = header.check_json(told)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def _check(folder: Path, told: dict[str, Any]) -> dict[str, Any] | None:
    """What the header says if it fits; None if there is none, or a damaged one.

    Raises:
      ValueError: it is another's.
    """
    try:
        text = (folder / HEADER).read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    try:
        kept = json.loads(text.partition("\n")[0])
        if text != _signed(kept):
            return None
    except (ValueError, TypeError):
        return None
    ours = told | {"chunk": kept.get("chunk")}
    if kept != ours:
        wrong = [name for name in told if kept.get(name) != ours[name]]
        theirs, mine = kept.get("key"), told["key"]
        if "key" in wrong and isinstance(theirs, dict):
            wrong = [name for name in mine if theirs.get(name) != mine[name]]
        raise ValueError(
            f"{folder} holds the features of another {' and '.join(wrong)}: remove it, "
            "or choose another folder"
        )
    return kept


class Rows:
    """Rows in a folder; made by `open_rows`.

    Attributes:
      folder: where they are.
      chunk: rows in a chunk.
      damaged: how many chunks were there with other bytes than were written.
    """

    def __init__(
        self, folder: Path, told: Mapping[str, Any], lines: BinaryIO, content: BinaryIO
    ):
        self.folder, self._lines, self._content = folder, lines, content
        self._count, self._shape = told["count"], tuple(told["shape"])
        self._dtype, self.chunk = np.dtype(told["dtype"]), told["chunk"]
        self._known = self._read_lines()
        written = len(self._known)
        self._known = {c: x for c, x in self._known.items() if self._is_whole(c, x)}
        self.damaged = written - len(self._known)

    def missing(self) -> list[range]:
        """The rows to write, in ranges that begin and end with chunks."""
        found: list[range] = []
        for c in range(-(-self._count // self.chunk)):
            if c in self._known:
                continue
            rows = self._rows_of(c)
            if found and found[-1].stop == rows.start:
                rows = range(found.pop().start, rows.stop)
            found.append(rows)
        return found

    def write(self, start: int, rows: np.ndarray) -> None:
        """Writes a chunk.

        Args:
          start: its first row.
          rows: float32 and finite, all rows of the chunk.

        Raises:
          ValueError: a number that is too large for float16.
          OSError: the disk is full, or the like.
        """
        c, expected = start // self.chunk, self._rows_of(start // self.chunk)
        assert expected.start == start and len(rows) == len(expected), "a whole chunk"
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, self._dtype)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"a feature of {np.abs(rows).max():.3g} is too large for float16: keep "
                "features as float32"
            )
        line = {
            "chunk": c,
            "sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
            "rounding": _rounding(rows, stored),
        }
        try:
            self._content.seek(start * self._row_bytes)
            self._content.write(stored.tobytes())
            self._content.flush()
            self._lines.write(json.dumps(line).encode() + b"\n")
            self._lines.flush()
        except OSError as error:
            reason = errors.reason_of(error)
            raise OSError(f"{self.folder} cannot be written: {reason}") from None
        self._known[c] = line

    def array(self) -> np.ndarray:
        """All rows, as a read-only memory map [count, ...]."""
        assert not self.missing(), "all chunks are written"
        shape = (self._count, *self._shape)
        return np.memmap(self.folder / ROWS, self._dtype, "r", shape=shape)

    def rounding(self) -> float:
        """The most that storing moved a row, as a share of its length."""
        return max(line["rounding"] for line in self._known.values())

    @property
    def _row_bytes(self) -> int:
        return self._dtype.itemsize * math.prod(self._shape)

    def _rows_of(self, c: int) -> range:
        return range(c * self.chunk, min((c + 1) * self.chunk, self._count))

    def _read_lines(self) -> dict[int, dict[str, Any]]:
        """The last line of each chunk; lines that a kill cut short do not count."""
        known = {}
        self._lines.seek(0)
        content = self._lines.read()
        for text in content.splitlines():
            try:
                line = json.loads(text)
                c, _ = line["chunk"], float(line["rounding"])
                if type(c) is int and self._rows_of(c) and c >= 0:
                    known[c] = {"sha256": "", **line}
            except (ValueError, KeyError, TypeError):
                continue
        if content and not content.endswith(b"\n"):
            self._lines.write(b"\n")  # the next line is a line of its own
        return known

    def _is_whole(self, c: int, line: Mapping[str, Any]) -> bool:
        rows = self._rows_of(c)
        self._content.seek(rows.start * self._row_bytes)
        content = self._content.read(len(rows) * self._row_bytes)
        whole = len(content) == len(rows) * self._row_bytes
        return whole and hashlib.sha256(content).hexdigest() == line["sha256"]


def _rounding(rows: np.ndarray, stored: np.ndarray) -> float:
    """The largest |stored - row| / |row|."""
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    moved = np.linalg.norm(stored.reshape(flat.shape) - flat, axis=1)
    return float(np.max(moved / np.maximum(np.linalg.norm(flat, axis=1), 1e-12)))
